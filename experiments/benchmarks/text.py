"""Tokens a second of raychain's training loop and of nanoGPT's, of the same models on the same tokens.

    python experiments/benchmarks/text.py --data data/demo-text --out text.json

One process, one thread, fp32, AdamW, gradients clipped at 1, the same model, batch and length. nanoGPT's loop reads
random rows of a memory-mapped file and computes all logits at once; raychain's has its loader, its cache and its
checks, logs every twentieth step as by default, and has no average of the weights, which the other has not. They take
turns, each being the first in every other run; a figure is the mean over a run's steps without the first twenty.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from raychain.config.loading import opened, validate
from raychain.events import Event, Step
from raychain.paradigms.lm.models import build, configuration
from raychain.runs.resolve import make_task
from raychain.training.stage import ChainWorker

WARM = 20
"""Steps that are left out, and those from one logged step to the next."""
LR, CLIP, DECAY = 1e-3, 1.0, 0.1


def of_raychain(data: Path, model: str, batch: int, length: int, steps: int) -> float:
    """Tokens a second of a stage."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = {
            "name": "speed",
            "task": {"paradigm": "lm", "length": length},
            "data": {"train": str(data / "train-*.bin")},
            "chain": [{"model": model, "epochs": f"{steps} steps"}],
            "train": {"global_batch": batch, "lr": LR, "warmup": "10 %", "clip_norm": CLIP, "weight_decay": DECAY,
                      "average": None, "precision": "fp32", "log_every": WARM},
            "compute": {"cpus_per_worker": 1},
            "preload": {"cache": f"{scratch}/cache"},
        }  # fmt: skip
        times: list[float] = []

        def emit(event: Event) -> None:
            if isinstance(event, Step):
                times.append(event.time)

        task = make_task(opened(validate(tree)), f"{scratch}/out")
        ChainWorker(task, torch.device("cpu"), emit, lambda: False).run()
    return batch * length * WARM * (len(times) - 1) / (times[-1] - times[0])


def of_nanogpt(data: Path, model: str, batch: int, length: int, steps: int) -> float:
    """The same of the loop in nanoGPT's train.py."""
    tokens = np.memmap(next(data.glob("train-*.bin")), np.uint16, "r")
    made: Any = build({**configuration(model), "vocab_size": 257}, seed=0).train()
    decayed = [p for p in made.parameters() if p.ndim >= 2]
    others = [p for p in made.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
    times = []
    for _ in range(steps):
        starts = torch.randint(len(tokens) - length, (batch,)).tolist()
        x, y = (
            torch.stack([torch.from_numpy(tokens[i + shift : i + shift + length].astype(np.int64)) for i in starts])
            for shift in (0, 1)
        )
        logits = made(input_ids=x, use_cache=False).logits
        F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1)).backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.time())
    return batch * length * (steps - WARM) / (times[-1] - times[WARM - 1])


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["CoM-LM-S", "CoM-LM-L"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60, help="a multiple of twenty")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for model in given.models:
        what = (given.data, model, given.batch, given.length, given.steps)
        rates = []
        for run in range(given.runs):
            loops = (of_raychain, of_nanogpt) if run % 2 == 0 else (of_nanogpt, of_raychain)
            rate = {loop: loop(*what) for loop in loops}
            rates.append((rate[of_raychain], rate[of_nanogpt]))
        ours, theirs = zip(*rates, strict=True)
        found[model] = {
            "raychain": ours,
            "nanogpt": theirs,
            "ratio": statistics.median(a / b for a, b in rates),
        }
        print(model, json.dumps(found[model]))
    setting = {name: str(value) for name, value in vars(given).items() if name != "out"}
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": platform.processor(),
        **setting,
        "tokens_per_s": found,
    }
    given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
