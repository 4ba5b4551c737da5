"""Trains the rows of a study for every seed and tabulates them: `python experiments/evidence/study.py STUDY.yaml WORK`.

A study is a YAML file with `experiment` (without a chain), `models` (a folder of models of its own, if any), `seeds`,
`baseline` (the row that costs are compared with), and `rows`: each a `name`, a `chain`, and whatever else of the
experiment it changes. What is trained on and measured is either a demo of pictures with captions, made as `demo` says,
whose score is the mean of zero-shot top-1 and retrieval; or data that lies in WORK, which `{work}` stands for in
the file (packaged.py makes some): `splits` then has the evaluators of validation and of test, and `score` the `metric`
that is tabulated, `EVALUATOR/METRIC`, with how many `digits`.

Every row is a `raychain.run` of one worker with one thread, and as many are at work as there are cores; those that
begin with the same model follow one another, so that stages and trunks are shared through the storage in WORK. With
`in_process: true` rows are trained in this process, without Ray, one after the other, and seconds are the processor's.
The same command continues. STUDY.json beside the study gets everything measured, on validation and test.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import yaml
from in_process import train_here

import raychain
from raychain.demo import make_demo

SPLITS = ("validation", "test")


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `changes`, at every depth."""
    both = {key: merged(base[key], changes[key]) for key in base.keys() & changes.keys()
            if isinstance(base[key], dict) and isinstance(changes[key], dict)}  # fmt: skip
    return base | changes | both


def train(study: dict[str, Any], row: dict[str, Any], seed: int, work: Path) -> dict[str, Any]:
    """One row with one seed, measured on both splits."""
    done = work / "rows" / f"{re.sub('[^A-Za-z0-9.]+', '_', row['name'])}-{seed}.json"
    fixed = {
        "name": done.stem,
        "compute": {"workers": 1, "cpus_per_worker": 1},
        "preload": {"cache": str(work / "cache")},
        "train": {"seed": seed},
        "storage": str(work / "runs"),
    } | ({"models": str(Path(study["models"]).absolute())} if "models" in study else {})
    if "demo" in study:
        fixed |= {
            "data": {"train": str(work / "data/study-demo/train")},
            "evaluate": {"zero_shot": str(work / "data/study-demo/zero_shot/validation")},
        }
    changes = {key: value for key, value in row.items() if key != "name"}
    file, content = done.with_suffix(".yaml"), yaml.safe_dump(merged(merged(study["experiment"], fixed), changes))
    content = content.replace("{work}", str(work))
    if done.exists() and file.read_text() == content:
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    done.unlink(missing_ok=True)
    file.write_text(content)
    stages = train_here(file, work) if study.get("in_process") else by_command(file, row["name"], work)
    result = {
        "name": row["name"],
        "seed": seed,
        "chain": [{"model": stage["model"], "epochs": stage["epochs"]} for stage in stages],
        "macs": sum(stage["macs"] for stage in stages),
        "seconds": round(sum(stage.get("cpu_s", stage["wall_s"]) for stage in stages), 1),
        "metrics": {split: measure(study, work, done.stem, stages[-1]["checkpoint"], split) for split in SPLITS},
    }
    done.write_text(json.dumps(result, indent=1))
    return result


def by_command(file: Path, name: str, work: Path) -> list[dict[str, Any]]:
    """The stages of an experiment file, as run.json has them, trained by `raychain run`."""
    with file.with_suffix(".log").open("a") as log:
        command = [sys.executable, "-m", "raychain.run", str(file), "--json"]
        ran = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, stderr=log, text=True)  # noqa: S603
    if ran.returncode:
        raise SystemExit(f"{name}, {file.stem} failed: see {log.name}")
    found: list[dict[str, Any]] = json.loads(ran.stdout)["stages"]
    return found


def measure(study: dict[str, Any], work: Path, name: str, checkpoint: str, split: str) -> dict[str, float]:
    """What a stage reaches on one split; of a demo zero-shot and retrieval."""
    folder = str(work / "runs" / name / checkpoint)
    if "splits" in study:
        evaluators = yaml.safe_load(yaml.safe_dump(study["splits"][split]).replace("{work}", str(work)))
        found: dict[str, float] = raychain.evaluate(folder, evaluators=evaluators, cache=str(work / "cache"))["metrics"]
        return found
    data = [str(work / "data/study-demo" / part) for part in (f"zero_shot/{split}", split)]
    measured = raychain.evaluate(folder, data, captions=["txt", "json.captions"], cache=str(work / "cache"))
    return {key: value for result in measured["results"] for key, value in result["metrics"].items()}


def score(study: dict[str, Any], metrics: dict[str, float]) -> float:
    """The metric that the study names, else the mean of zero-shot top-1 and of both directions' recall, in percent."""
    if "score" in study:
        return metrics[study["score"]["metric"]]
    return metrics["zero_shot_top1"] / 2 + (metrics["i2t_r1"] + metrics["t2i_r1"]) / 4


def table(study: dict[str, Any], results: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: means over the seeds, and half of largest minus smallest."""
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_name[result["name"]].append(result)
    baseline = by_name.get(study.get("baseline", ""), [])
    digits = study.get("score", {}).get("digits", 1)
    yield "| | training MACs, T | of baseline | seconds | of baseline | score, validation | score, test | seeds |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in (row["name"] for row in study["rows"] if row["name"] in by_name):
        found = by_name[name]
        scores = [_spread([score(study, run["metrics"][split]) for run in found], digits) for split in SPLITS]
        costs = [*_cost("macs", 1e12, found, baseline), *_cost("seconds", 1, found, baseline)]
        yield "| " + " | ".join([name, *costs, *scores, str(len(found))]) + " |"


def _cost(key: str, unit: float, found: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> tuple[str, str]:
    mean = statistics.mean(result[key] for result in found)
    share = f"{100 * mean / statistics.mean(result[key] for result in baseline):.0f} %" if baseline else "–"
    return f"{mean / unit:.0f}" if mean / unit >= 100 else f"{mean / unit:.3g}", share


def _spread(values: list[float], digits: int) -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    """Trains what is missing, seed after seed, and writes what there is after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    study, work = yaml.safe_load(options.study.read_text()), options.work.absolute()
    (work / "rows").mkdir(parents=True, exist_ok=True)
    if "demo" in study:
        make_demo(work / "data/study-demo", **study["demo"])
    torch.set_num_threads(1)
    record = {
        "command": f"python experiments/evidence/study.py {options.study} WORK",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }
    results: list[dict[str, Any]] = []
    lanes: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for seed in study["seeds"]:
        for row in study["rows"]:
            lanes[seed, row["chain"][0]["model"]].append(row)
    lock = Lock()

    def follow(seed: int, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            result = train(study, row, seed, work)
            with lock:
                results.append(result)
                said = f"{score(study, result['metrics']['validation']):.{study.get('score', {}).get('digits', 1)}f}"
                print(f"{len(results)}/{sum(map(len, lanes.values()))} {row['name']}, seed {seed}: {said}", flush=True)
                content = json.dumps({**record, "study": study, "runs": results}, indent=1)
                options.study.with_suffix(".json").write_text(content + "\n")

    with ThreadPoolExecutor(1 if study.get("in_process") else options.jobs) as pool:
        for lane in as_completed([pool.submit(follow, seed, rows) for (seed, _), rows in lanes.items()]):
            lane.result()
    print("\n".join(table(study, results)))


if __name__ == "__main__":
    main()
