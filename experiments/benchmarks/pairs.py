"""Two checkouts of raychain against each other on the quick demo, taking turns: speed of each stage, gaps, memory.

python experiments/benchmarks/pairs.py BEFORE AFTER [--pairs 5] [--experiment demo-quick] [--set evaluate=null]
    [--out FILE]

BEFORE and AFTER are checkouts; both run in this interpreter's environment, in run folders and caches of their own that
are removed. Runs that FILE has are not repeated. "With what stood before it" is the time from the end of the stage
before to the end of the stage, whatever is done in it. Memory is the largest sum of the private and shared bytes (PSS)
of a run's processes, looked at every two seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil


def measure(checkout: Path, experiment: str, changes: list[str]) -> dict[str, Any]:
    """One run: seconds, samples a second and gap of each stage, peak memory in bytes."""
    with tempfile.TemporaryDirectory(prefix="pairs-") as scratch:
        command = [sys.executable, "-m", "raychain.run", experiment, "--json", "--out", f"{scratch}/run"]
        command += ["--set", f"preload.cache={scratch}/cache"]
        command += [part for change in changes for part in ("--set", change)]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        began, peak = time.monotonic(), 0
        with (Path(scratch) / "out").open("w+") as out, (Path(scratch) / "err").open("w+") as err:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=err, cwd=scratch)  # noqa: S603
            while process.poll() is None:
                peak = max(peak, memory(process.pid))
                time.sleep(2)
            out.seek(0), err.seek(0)
            if process.returncode:
                raise SystemExit(f"{' '.join(command)} in {checkout}: {err.read()[-2000:]}")
            run = json.load(out)
        trace = json.loads(Path(scratch, "run", "trace.json").read_text())["traceEvents"]
        ends = [event["ts"] + event["dur"] for event in trace if event.get("cat") == "stage"]
        stages = [
            {
                "model": stage["model"],
                "samples_per_s": stage["samples_seen"] / stage["wall_s"],
                # before 2026-11-28 gap_s ended with the first step, which is now counted apart
                "gap_s": stage["gap_s"] and stage["gap_s"] + stage.get("first_step_s", 0.0),
                "first_step_s": stage.get("first_step_s"),
                "data_wait_s": stage["data_wait_s"],
            }
            | ({"whole_s": (end - before) / 1e6} if before else {})
            for stage, before, end in zip(run["stages"], [None, *ends], ends, strict=False)
        ]
        return {"seconds": round(time.monotonic() - began, 2), "peak_bytes": peak, "stages": stages}


def memory(pid: int) -> int:
    """PSS of a process and all below it, in bytes."""
    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error, OSError):
                total += process.memory_full_info().pss
    return total


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Medians of both, and of the ratio of each pair, with the pairs' range."""
    lines = ["| | before | after | after / before (range of pairs) |", "|---|---|---|---|"]

    def add(name: str, values: list[tuple[float, float]], digits: int = 3) -> None:
        before, after = (statistics.median(side) for side in zip(*values, strict=True))
        ratios = [b / a for a, b in values if a]
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})" if ratios else "–"
        lines.append(f"| {name} | {before:.{digits}g} | {after:.{digits}g} | {ratio} |")

    pairs = list(zip(found["before"], found["after"], strict=False))
    for place, stage in enumerate(pairs[0][0]["stages"]):
        rates = [tuple(run["stages"][place]["samples_per_s"] for run in pair) for pair in pairs]
        add(f"{stage['model']}, samples/s", rates, 4)  # type: ignore[arg-type]
        if place:
            wholes = [tuple(run["stages"][place]["whole_s"] for run in pair) for pair in pairs]
            add(f"{stage['model']} with what stood before it, s", wholes)  # type: ignore[arg-type]
            add(
                f"gap before {stage['model']} with its first step, s",
                [tuple(r["stages"][place]["gap_s"] for r in p) for p in pairs],
            )  # type: ignore[misc]
    add("whole command, s", [(a["seconds"], b["seconds"]) for a, b in pairs])
    add("peak memory, GiB", [(a["peak_bytes"] / 2**30, b["peak_bytes"] / 2**30) for a, b in pairs])
    return "\n".join(lines)


def main() -> None:
    """Runs the pairs that are missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--experiment", default="demo-quick")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of raychain run")
    parser.add_argument("--out", type=Path, default=Path("pairs.json"))
    given = parser.parse_args()
    checkouts = {"before": given.before.resolve(), "after": given.after.resolve()}
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    commits = {
        name: subprocess.check_output(["git", "-C", str(path), "describe", "--always", "--dirty"], text=True).strip()  # noqa: S603, S607
        for name, path in checkouts.items()
    }
    found = {"before": [], "after": [], **found} | {"experiment": given.experiment, "commits": commits}
    found["set"] = given.set
    found["machine"] = f"{os.cpu_count()} × {platform.processor() or platform.machine()}"
    for pair in range(given.pairs):
        for name in ("before", "after") if pair % 2 == 0 else ("after", "before"):
            if len(found[name]) == pair:
                found[name].append(measure(checkouts[name], given.experiment, given.set))
                found["date"] = datetime.now().astimezone().isoformat(timespec="seconds")
                given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
