"""Pictures a second of raychain's training loop and of the one in timm's train.py, of the same models and pictures.

    python experiments/benchmarks/classes.py --pictures FOLDER --shards SHARDS --out classes.json

FOLDER has a folder of pictures for each class, SHARDS are what `raychain data build` makes of it. One process, one
thread, fp32, AdamW, cross-entropy with label smoothing, gradients clipped at 1, random resized crops and flips, the
same model and batch; timm's loader works in the thread of its loop. They take turns, a step each; see turns.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad
from turns import in_turns

from raychain.paradigms.classify.models import describe

LR, CLIP, DECAY, SMOOTHING, CROP = 1e-3, 1.0, 0.05, 0.1, [0.6, 1.0]


def measured(given: argparse.Namespace, model: str) -> tuple[float, float]:
    """Pictures a second of a stage of raychain's, and of timm's loop."""
    classes = sum(path.is_dir() for path in given.pictures.iterdir())
    tree = {
        "task": {"paradigm": "classify", "classes": classes, "smoothing": SMOOTHING},
        "data": {"train": given.shards, "crop": CROP},
        "chain": [{"model": model, "epochs": f"{given.steps} steps"}],
        "train": {"global_batch": given.batch, "lr": LR, "warmup": "10 %", "clip_norm": CLIP, "weight_decay": DECAY},
    }
    ours, theirs = in_turns(tree, of_timm(given, model, classes))
    return given.batch / ours, given.batch / theirs


def of_timm(given: argparse.Namespace, model: str, classes: int) -> Callable[[], None]:
    """A step of the loop in timm's train.py."""
    named = describe(model)
    made: Any = timm.create_model(named.architecture, num_classes=classes, img_size=named.size, **named.options)
    made.train()
    dataset = create_dataset("", root=str(given.pictures), is_training=True)
    loader = create_loader(
        dataset, (3, named.size, named.size), given.batch, is_training=True, use_prefetcher=False, scale=CROP,
        color_jitter=None, interpolation="bicubic", num_workers=0, persistent_workers=False,
        device=torch.device("cpu"),
    )  # fmt: skip
    loss, optimizer = LabelSmoothingCrossEntropy(SMOOTHING), create_optimizer_v2(made, "adamw", LR, DECAY)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from loader

    found = batches()

    def step() -> None:
        pictures, labels = next(found)
        loss(made(pictures), labels).backward()
        dispatch_clip_grad(made.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["CoM-micro-DeiT-M", "CoM-micro-DeiT-L"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for model in given.models:
        ours, theirs = zip(*[measured(given, model) for _ in range(given.runs)], strict=True)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        found[model] = {"raychain": ours, "timm": theirs, "ratio": ratio}
        print(model, json.dumps(found[model]), flush=True)
    setting = {"batch": given.batch, "steps": given.steps, "runs": given.runs}
    result = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": platform.machine(), **setting, "pictures": found}
    given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
