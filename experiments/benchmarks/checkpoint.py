"""What saving costs a stage: `python experiments/benchmarks/checkpoint.py`.

One stage that saves every two seconds. A logged line speaks of the steps since the line before, so the time that a
checkpoint costs is what the lines during which one was copied or written took longer than the others. Prints the cost
of a checkpoint, and its share of the time when one is saved every 30 seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import raychain
from raychain.config.loading import validate
from raychain.demo import make_demo

EVERY_S, USUAL_S = 2, 30


def measure(data: Path, model: str, steps: int) -> dict[str, float]:
    """Seconds a checkpoint costs the training loop, and how many were saved."""
    with tempfile.TemporaryDirectory() as out:
        tree = {
            "name": "saving",
            "data": {"train": f"{data}/train/*.tar"},
            "chain": [{"model": model, "epochs": f"{steps} steps"}],
            "train": {"global_batch": 64, "warmup": "10 %", "log_every": 1},
            "compute": {"workers": 1, "cpus_per_worker": 1},
            "preload": {"cache": f"{data}/cache"},
            "checkpoint": {"every": f"{EVERY_S} seconds"},
            "storage": out,
        }
        raychain.run(validate(tree))
        folder = Path(out) / "saving"
        times = [json.loads(line)["time"] for line in (folder / "metrics.jsonl").read_text().splitlines()][20:]
        bars = json.loads((folder / "trace.json").read_text())["traceEvents"]
        starts = [bar["ts"] / 1e6 for bar in bars if bar.get("cat") == "checkpoint"]
        # The write follows the copy in the background; a second holds both for models of this size.
        steps_s = [(b, b - a) for a, b in itertools.pairwise(times)]
        during = [s for t, s in steps_s if any(start <= t < start + 1 for start in starts)]
        otherwise = statistics.median(s for t, s in steps_s if not any(start <= t < start + 1 for start in starts))
        cost = sum(during) - len(during) * otherwise
        return {"seconds": cost / len(starts), "checkpoints": len(starts), "step_s": otherwise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="CoM-micro-M")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make_demo(Path(scratch), pictures=4_000)
        runs = [measure(Path(scratch), options.model, options.steps) for _ in range(options.repeats)]
    costs = sorted(run["seconds"] for run in runs)
    shares = [f"{100 * cost / USUAL_S:.2f} %" for cost in (statistics.median(costs), costs[0], costs[-1])]
    print(f"A checkpoint of {options.model} costs {statistics.median(costs):.3f} s ({costs[0]:.3f} – {costs[-1]:.3f});")
    print(f"one every {USUAL_S} s is {shares[0]} ({shares[1]} – {shares[2]}) of the training time.")
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    print(
        json.dumps({"command": " ".join(sys.argv), "machine": machine, "date": time.strftime("%Y-%m-%d"), "runs": runs})
    )


if __name__ == "__main__":
    main()
