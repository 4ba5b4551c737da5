"""Tokens a second of raychain's training loop and of nanoGPT's, of the same models on the same tokens.

    python experiments/benchmarks/text.py --data data/demo-text --out text.json

One process, one thread, fp32, AdamW, gradients clipped at 1, the same model, batch and length. nanoGPT's loop reads
random rows of a memory-mapped file and computes all logits at once; raychain's has its loader, its cache and its
checks, and no average of the weights, which the other has not. They take turns, a step each, so that both meet the same
machine. Seconds are the processor's: of nanoGPT's step those of its thread, of raychain's all others of the process,
its loader's too. A figure is the median over a run's steps without the first ten.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from turns import in_turns

from raychain.paradigms.lm.models import build, configuration

LR, CLIP, DECAY = 1e-3, 1.0, 0.1


def measured(data: Path, model: str, batch: int, length: int, steps: int) -> tuple[float, float]:
    """Tokens a second of a stage of raychain's, and of nanoGPT's loop."""
    tree = {
        "task": {"paradigm": "lm", "length": length},
        "data": {"train": str(data / "train-*.bin")},
        "chain": [{"model": model, "epochs": f"{steps} steps"}],
        "train": {"global_batch": batch, "lr": LR, "warmup": "10 %", "clip_norm": CLIP, "weight_decay": DECAY},
    }
    ours, theirs = in_turns(tree, nanogpt(data, model, batch, length))
    return batch * length / ours, batch * length / theirs


def nanogpt(data: Path, model: str, batch: int, length: int) -> Callable[[], None]:
    """A step of the loop in nanoGPT's train.py."""
    tokens = np.memmap(next(data.glob("train-*.bin")), np.uint16, "r")
    made: Any = build({**configuration(model), "vocab_size": 257}, seed=0).train()
    decayed = [p for p in made.parameters() if p.ndim >= 2]
    others = [p for p in made.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)

    def step() -> None:
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

    return step


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["CoM-LM-S", "CoM-LM-L"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for model in given.models:
        what = (given.data, model, given.batch, given.length, given.steps)
        rates = [measured(*what) for _ in range(given.runs)]
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
        "machine": platform.machine(),
        **setting,
        "tokens_per_cpu_s": found,
    }
    given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
