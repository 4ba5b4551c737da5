"""What the step from one stage to the next costs: `python experiments/benchmarks/handover.py`.

A two-stage chain whose second stage reads other shards at another resolution, from object storage at 20 MB/s: with the
next stage's data preloaded, and with nothing prepared before the first stage ends (`preload.cpus: 0`). Then the first
stage alone in both ways, which shows what preloading the next stage costs it. Prints a table and a JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from throttle import object_storage

import raychain
from raychain.config.loading import validate
from raychain.demo import make_demo

MB = 1e6
BATCH, WINDOW = 64, 2
WARM_UP = 5
"""Log windows that count for nothing."""
WAYS = {"preloaded": {}, "nothing ahead": {"cpus": 0}}


def experiment(address: str, out: Path, preload: dict[str, Any], first: int, second: int) -> dict[str, Any]:
    """The two stages: 40 px pictures of `train`, then 48 px pictures of `other`."""
    return {
        "name": "handover",
        "data": {"train": address.format("train/*.tar"), "captions": {"keys": ["txt", "json.captions"]}},
        "chain": [
            {"model": "CoM-micro-S", "epochs": f"{first} steps"},
            {
                "model": "CoM-micro-M",
                "epochs": f"{second} steps",
                "data": {"train": address.format("other/*.tar"), "image_size": 48},
            },
        ],
        "train": {"global_batch": BATCH, "warmup": "10 %", "log_every": WINDOW},
        "compute": {"workers": 1, "cpus_per_worker": 1},
        "preload": {"cache": str(out / "cache"), **preload},
        "storage": str(out / "runs"),
    }


def measure(address: str, preload: dict[str, Any], first: int, second: int) -> dict[str, float]:
    """One run from an empty cache."""
    with tempfile.TemporaryDirectory() as out:
        run = raychain.run(validate(experiment(address, Path(out), preload, first, second)))
        before, after = run["stages"]
        folder = Path(out) / "runs" / "handover"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        first_stage = [line for line in lines if line["stage"] == 0][WARM_UP:]
        rates = [line["samples_per_s"] for line in first_stage]
        bars = json.loads((folder / "trace.json").read_text())["traceEvents"]
        ahead = [
            (bar["ts"] / 1e6, (bar["ts"] + bar["dur"]) / 1e6)
            for bar in bars
            if bar.get("cat") == "preload" and bar["args"]["stage"] == 1
        ]
        # Seconds of each log window, by whether the next stage was preloaded in the middle of it.
        windows = [(line["time"], WINDOW * BATCH / line["samples_per_s"]) for line in first_stage]
        inside = [took for end, took in windows if any(a < end - took / 2 < b for a, b in ahead)]
        outside = [took for end, took in windows if not any(a < end - took / 2 < b for a, b in ahead)]
        lost = sum(inside) - len(inside) * statistics.median(outside)
        return {
            "preloading_s": sum(inside),
            "slower_meanwhile_percent": 100 * lost / (sum(inside) - lost) if inside else 0.0,
            "slower_percent": 100 * lost / (sum(inside) + sum(outside) - lost),
            "gap_s": after["gap_s"] + after["first_step_s"],  # with the first step, as in earlier figures
            "wait_percent": 100 * after["data_wait_s"] / after["wall_s"],
            "first_stage_s": before["wall_s"] - before["data_wait_s"],
            "first_stage_images_per_s": statistics.median(rates),
        }


def main() -> None:
    """Alternates the ways, so that other load on the machine meets both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rate", type=float, default=20.0, help="MB/s of the storage")
    parser.add_argument("--first", type=int, default=600, help="steps of the first stage")
    parser.add_argument("--second", type=int, default=100, help="steps of the second stage")
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch)
        make_demo(data / "train-demo", pictures=8_000)
        make_demo(data / "other-demo", pictures=12_000, seed=1)
        folder = data / "bucket"
        folder.mkdir()
        for name in ("train", "other"):
            (data / f"{name}-demo" / "train").rename(folder / name)
        with object_storage(folder, options.rate * MB) as address:
            for repeat in range(options.repeats):
                for way, preload in WAYS.items():
                    results[way].append(measure(address, preload, options.first, options.second))
                    print(f"{repeat + 1}/{options.repeats} {way}: {results[way][-1]}", file=sys.stderr, flush=True)
    print("| | gap, s | second stage waits for data, % of its time | first stage, images/s |\n|---|---|---|---|")
    for way, found in results.items():
        cells = [_spread(found, key) for key in ("gap_s", "wait_percent", "first_stage_images_per_s")]
        print(f"| {way} | " + " | ".join(cells) + " |")
    slower, stage = (_spread(results["preloaded"], f"slower_{of}percent") for of in ("meanwhile_", ""))
    print(f"\nWithin a run, the first stage is slower by {slower} % while the next one is preloaded, {stage} % in all.")
    rates = {way: statistics.median(run["first_stage_images_per_s"] for run in found) for way, found in results.items()}
    between = 100 * (1 - rates["preloaded"] / rates["nothing ahead"])
    print(f"Between runs, the first stage is slower by {between:.1f} % with preloading.")
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    print(json.dumps({"command": " ".join(sys.argv), "machine": machine, "date": time.strftime("%Y-%m-%d"), **results}))


def _spread(found: list[dict[str, float]], key: str) -> str:
    values = [run[key] for run in found]
    return f"{statistics.median(values):.2f} ({min(values):.2f} – {max(values):.2f})"


if __name__ == "__main__":
    main()
