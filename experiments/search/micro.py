"""What a search of 24 chains costs and finds: `python experiments/search/micro.py WORK --out results.json`.

Runs experiments/search/micro.yaml with `schedule: cosine` and with `wsd`, each killed twice and started
again; trains three of each search's chains alone and compares their metrics; measures what was found on the test split.
WORK keeps everything: the same command continues.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import raychain
from raychain.config.loading import load_experiment
from raychain.demo import make_demo

HERE = Path(__file__).parent
METRIC = "zero_shot_top1"
KILL_AFTER = (8, 16)
"""Trials that are over when the search is killed."""


def search(work: Path, schedule: str, at_most: float) -> dict[str, Any]:
    """search.json of a search that is killed and started again; after `at_most` seconds a call this ends."""
    out, file = work / schedule / "search", work / schedule / "calls.json"
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "raychain.search", str(HERE / "micro.yaml"), "--out", str(out)]
    command += ["--set", f"train.schedule={schedule}", "--set", f"storage={work / schedule / 'runs'}"]
    calls: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    while not calls or calls[-1]["killed"]:
        kills = [count for count in KILL_AFTER if count > over(out)]
        began, late = time.time(), False
        with (work / schedule / "log").open("a") as log:
            process = subprocess.Popen(command, cwd=work, stdout=log, stderr=log)
            while process.poll() is None:
                time.sleep(1)
                late = time.time() - began > at_most
                if late or (kills and over(out) >= kills[0]):
                    process.send_signal(signal.SIGKILL)
                    process.wait()
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"the search failed: see {work / schedule / 'log'}")
        killed = process.returncode != 0
        calls.append({"seconds": time.time() - began, "killed": killed, "finished": finished(work / schedule)})
        file.write_text(json.dumps(calls))
        if killed and late:
            raise SystemExit(f"{schedule}: {over(out)} trials are over; the same command goes on")
    now = calls[-1]["finished"]
    result: dict[str, Any] = json.loads((out / "search.json").read_text())
    return result | {
        "seconds": sum(call["seconds"] for call in calls),
        "killed_with": [len(call["finished"]) for call in calls[:-1]],
        "again": sorted({key for call in calls for key, at in call["finished"].items() if now.get(key) != at}),
        "gaps": gaps(out),
    }


def gaps(out: Path) -> list[float]:
    """Seconds from stage to stage within the paths that a worker group trained."""
    runs = [json.loads(path.read_text()) for path in out.glob("chains/*/run.json")]
    return sorted(stage["gap_s"] for run in runs for stage in run["stages"] if stage.get("gap_s") is not None)


def over(out: Path) -> int:
    try:
        return sum(trial["status"] != "running" for trial in json.loads((out / "search.json").read_text())["trials"])
    except (OSError, ValueError):
        return 0


def finished(folder: Path) -> dict[str, int]:
    """When each stage in the store was written; its record is written again when it is measured."""
    found = {path.parent for path in folder.glob("runs/store/*/stage.json")}
    parts = {stage.name: [part for part in stage.iterdir() if part.name != "stage.json"] for stage in found}
    return {name: max(part.stat().st_mtime_ns for part in files) for name, files in parts.items()}


def alone(work: Path, schedule: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The best, the middle and the last of the chains, trained without the search."""
    own = sorted(
        (t for t in found["trials"] if t["kind"] in ("planned", "sampled")), key=lambda t: -t["metrics"][METRIC]
    )
    compared = []
    for trial in (own[0], own[len(own) // 2], own[-1]):
        tree = yaml.safe_load((HERE / "micro.yaml").read_text())
        tree = {key: value for key, value in tree.items() if key not in ("family", "search")}
        tree |= {
            "name": f"trial-{trial['number']}",
            "storage": str(work / schedule / "alone"),
            "transfer": trial["transfer"],
        }
        tree["train"]["schedule"] = schedule
        tree["chain"] = [{"model": stage["model"], "epochs": stage["epochs"]} for stage in trial["chain"]]
        file = work / schedule / f"trial-{trial['number']}.yaml"
        file.write_text(yaml.safe_dump(tree))
        run = raychain.run(load_experiment(str(file)))
        compared.append(
            {
                "trial": trial["number"],
                "same_stages": [stage["key"] for stage in run["stages"]] == trial["keys"],
                "in_the_search": trial["metrics"],
                "alone": run["stages"][-1]["metrics"],
            }
        )
    return compared


def on_test(work: Path, schedule: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every trial's accuracy on the test split."""
    measured = []
    for trial in found["trials"]:
        stage = work / schedule / "runs/store" / trial["keys"][-1]
        result = raychain.evaluate(str(stage), str(work / "data/search-demo/zero_shot/test"), cache=str(work / "cache"))
        row = {name: trial[name] for name in ("number", "kind", "chain", "macs")}
        measured.append(row | {"validation": trial["metrics"][METRIC], "test": result["results"][0]["metrics"][METRIC]})
    return measured


def verdict(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether a found chain reaches the large model's accuracy alone on the test split at fewer MACs than the planner's
    chains that reach it.
    """
    large = max((len(t["chain"]), t["chain"][-1]["model"]) for t in trials)[1]
    controls = [t for t in trials if t["kind"] == "control" and t["chain"][0]["model"] == large]
    target = max(controls, key=lambda t: t["test"])
    reach = {
        kind: [t for t in trials if t["kind"] == kind and t["test"] >= target["test"]]
        for kind in ("planned", "sampled")
    }
    cheapest = {kind: min(found, key=lambda t: t["macs"], default=None) for kind, found in reach.items()}
    return {"alone": target, "cheapest_that_reach_it": cheapest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--schedules", nargs="+", default=["cosine", "wsd"])
    parser.add_argument("--at-most", type=float, default=math.inf, help="seconds that one call of a search may take")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    make_demo(work / "data/search-demo", names=60, pictures=1_000, held_out=200, per_name=20)
    results: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
    }
    for schedule in options.schedules:
        found = search(work, schedule, options.at_most)
        trials = on_test(work, schedule, found)
        requested, trained = found["stage_epochs_requested"], found["stage_epochs_trained"]
        results[schedule] = {
            "seconds": round(found["seconds"]),
            "stage_epochs_requested": requested,
            "stage_epochs_trained": trained,
            "ratio": round(trained / requested, 4),
            "stage_epochs_of_chains": found["stage_epochs_of_chains"],
            "stages_finished_when_killed": found["killed_with"],
            "trained_again_after_a_kill": found["again"],
            "gaps_s": found["gaps"],
            "alone": alone(work, schedule, found),
            "verdict": verdict(trials),
            "trials": trials,
        }
        print(f"{schedule}: {trained} of {requested} stage epochs trained ({trained / requested:.2f})", flush=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
