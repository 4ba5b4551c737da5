"""Which growth operator should be the default? `python experiments/growth/compare.py` answers with README.md's tables.

One small model a seed is trained, grown in every way into the same larger one, and that is trained for 800 steps. Each
run is one process with one thread. Finished runs are kept in `runs/growth`, so the same command continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch

from raychain.config import Experiment
from raychain.config.loading import validate
from raychain.demo import make_demo
from raychain.evaluators.config import Evaluate
from raychain.evaluators.evaluator import Setting
from raychain.evaluators.suite import Evaluation, Results, resolve_suite
from raychain.runs.checks import check_experiment
from raychain.runs.resolve import make_task
from raychain.training.finished import STAGE_RECORD
from raychain.training.stage import ChainWorker
from raychain.training.task import ChainTask, StageTask

HERE = Path(__file__).resolve().parent
TEACHER, STUDENT = "CoM-micro-T", "CoM-micro-S-3"
TEACHER_STEPS, STEPS, BATCH = 5_000, 800, 64
MEASURED = (0, 50, 100, 200, 400, 800)
SHOWN = (0, 50, 200, 800)
SPLITS = ("validation", "test")
TABLES = "## Tables"
"""What follows in README.md is written by this script."""


class Variant(NamedTuple):
    """One way to grow, and to train on."""

    width: str
    depth: str
    distill: bool = True
    optimizer: str = "grow"
    lr_scale: float = 1.0
    warmup: str = "10 %"
    average: str | None = None

    @property
    def name(self) -> str:
        distill = "distilled" if self.distill else "alone"
        restart = f"lr{self.lr_scale:g}-warm{self.warmup.split()[0]}-avg{(self.average or '0').split()[0]}"
        return f"{self.width}_{self.depth}-{distill}-{self.optimizer}-{restart}"


STATES = tuple((distill, optimizer) for distill in (True, False) for optimizer in ("grow", "reset"))
OPERATORS = (
    ("embed", "interleave"),
    ("duplicate", "identity"),
    ("centred", "identity"),
    ("reference", "interleave"),
)
GRID = tuple(Variant(*operator, *state) for operator in OPERATORS for state in STATES)
CONTROLS = tuple(Variant("none", "identity", distill, "reset") for distill in (False, True))
DEFAULT = Variant("centred", "identity", optimizer="reset", average="10 %")
RESTARTS = (
    DEFAULT,
    DEFAULT._replace(optimizer="grow"),
    DEFAULT._replace(distill=False),
    DEFAULT._replace(width="embed", depth="interleave"),
    DEFAULT._replace(average=None),
    DEFAULT._replace(average=None, lr_scale=0.25),
    DEFAULT._replace(average=None, lr_scale=0.1),
)
URGENT = (*GRID[:12], *RESTARTS[:2], CONTROLS[0])
"""Trained first for all seeds."""


def experiment(variant: Variant, seed: int, data: Path) -> Experiment:
    """The chain of one run."""
    transfer = {**variant._asdict(), "distill": {} if variant.distill else None}
    average = transfer.pop("average")
    return validate(
        {
            "name": variant.name,
            "data": {"train": str(data / "train"), "captions": {"keys": ["txt", "json.captions"]}},
            "chain": [
                {"model": TEACHER, "epochs": f"{TEACHER_STEPS} steps"},
                {"model": STUDENT, "epochs": f"{STEPS} steps"},
            ],
            "transfer": transfer,
            "train": {"global_batch": BATCH, "warmup": "10 %", "seed": seed, "average": average},
            "compute": {"cpus_per_worker": 1},
            "preload": {"cache": str(data / "cache")},
            "evaluate": {"every": "50 steps"},
        }
    )


class Probe(ChainWorker):
    """A worker that measures on both splits, at the steps of MEASURED and at the end of each stage."""

    def __init__(self, task: ChainTask, splits: dict[str, ChainTask]) -> None:
        super().__init__(task, torch.device("cpu"), lambda _: None, lambda: False)
        self.splits, self.chain_task = splits, task
        self.measures: dict[str, dict[int, dict[str, float]]] = {split: {} for split in splits}

    def measure(
        self,
        stage: StageTask,
        model: torch.nn.Module,
        step: int,
        evaluations: Sequence[Evaluation],  # noqa: ARG002
    ) -> Results:
        found: Results = {}
        for split, task in self.splits.items() if step in MEASURED or step == stage.steps else ():
            self.task = task
            found = super().measure(stage, model, step, task.suite.evaluations)
            self.measures[split][step] = task.suite.metrics(found)
        self.task = self.chain_task
        return found


def train(variant: Variant, seed: int, data: Path, runs: Path) -> None:
    """Trains one variant, or the teacher of this seed if it is not there yet, and keeps what was measured."""
    done, teacher = runs / f"{variant.name}-seed{seed}.json", runs / f"teacher-{seed}"
    if done.exists():
        return
    torch.set_num_threads(1)
    open_clip.add_model_config(HERE / "models")
    config = experiment(variant, seed, data)
    check_experiment(config)
    with tempfile.TemporaryDirectory(dir=runs) as out:
        stage = Path(out) / "stages" / f"0-{TEACHER}"
        if teacher.exists():
            shutil.copytree(teacher, stage)
        task = make_task(config, out)
        if not teacher.exists():
            probe = Probe(dataclasses.replace(task, stages=task.stages[:1]), _splits(task, data))
            probe.run()
            _write(runs / f"teacher-{seed}.json", {"macs": task.stages[0].macs, "measures": probe.measures})
            stage.rename(teacher)
            return
        # One teacher for all, whether or not the student's weights are averaged.
        record = json.loads((stage / STAGE_RECORD).read_text())
        (stage / STAGE_RECORD).write_text(json.dumps(record | {"key": task.stages[0].key}))
        started = time.perf_counter()
        probe = Probe(task, _splits(task, data))
        probe.run()
        seconds = round(time.perf_counter() - started, 1)
        result = {**variant._asdict(), "seed": seed, "macs": task.stages[1].macs, "seconds": seconds}
        _write(done, result | {"measures": probe.measures})


def _splits(task: ChainTask, data: Path) -> dict[str, ChainTask]:
    """The task with each split of the demo data as what is measured."""
    cache, keys = Path(task.experiment.preload.cache), task.experiment.data.captions.keys
    return {
        split: dataclasses.replace(
            task,
            suite=resolve_suite(
                Evaluate.model_validate({"zero_shot": str(data / "zero_shot" / split), "retrieval": str(data / split)}),
                Setting(cache, keys),
            ),
        )
        for split in SPLITS
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=1))
    scratch.replace(path)


def score(metrics: dict[str, float]) -> float:
    """Mean of zero-shot top-1 and the mean of both directions' recall at 1, in percent."""
    return metrics["zero_shot_top1"] / 2 + (metrics["i2t_r1"] + metrics["t2i_r1"]) / 4


class Row(NamedTuple):
    """What the seeds of one variant gave on one split, in points of `score`."""

    variant: Variant
    seeds: int
    shown: list[tuple[float, float]]
    """(mean, spread) at each step of SHOWN; the spread is largest minus smallest."""
    loss: tuple[float, float]
    """How far a seed fell below its teacher at the worst of MEASURED: mean and worst; negative: never below."""
    macs: int


def rows(variants: Iterable[Variant], split: str, seeds: int, runs: Path) -> list[Row]:
    """The finished variants, in the order given."""
    found = []
    for variant in variants:
        curves, losses, macs = [], [], 0
        for seed in range(seeds):
            path = runs / f"{variant.name}-seed{seed}.json"
            if not path.exists():
                continue
            result = json.loads(path.read_text())
            curve = {int(step): score(metrics) for step, metrics in result["measures"][split].items()}
            teacher = json.loads((runs / f"teacher-{seed}.json").read_text())["measures"][split]
            curves.append(curve)
            losses.append(score(teacher[str(TEACHER_STEPS)]) - min(curve.values()))
            macs = result["macs"]
        if curves:
            shown = [_spread([curve[step] for curve in curves]) for step in SHOWN]
            found.append(Row(variant, len(curves), shown, (statistics.mean(losses), max(losses)), macs))
    return found


def _spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), max(values) - min(values)


def table(found: Iterable[Row]) -> Iterator[str]:
    """Markdown of one table."""
    yield (
        "| width + depth | distilled | moments | lr × | warm-up | averaged over | "
        + " | ".join("grown" if step == 0 else f"{step} steps" for step in SHOWN)
        + " | below teacher, mean (worst) | MACs, T | seeds |"
    )
    yield "|---" * (9 + len(SHOWN)) + "|"
    for row in found:
        v = row.variant
        cells = [f"{v.width} + {v.depth}", "yes" if v.distill else "no", v.optimizer, f"{v.lr_scale:g}", v.warmup]
        cells += [v.average or "–", *(f"{mean:.1f} ± {spread / 2:.1f}" for mean, spread in row.shown)]
        yield (
            "| "
            + " | ".join([*cells, f"{row.loss[0]:.1f} ({row.loss[1]:.1f})", f"{row.macs / 1e12:.2f}", str(row.seeds)])
            + " |"
        )


def report(seeds: int, runs: Path) -> str:
    """All tables, Markdown."""
    lines = []
    for split in SPLITS:
        teachers = [json.loads(path.read_text()) for path in sorted(runs.glob("teacher-?.json"))[:seeds]]
        mean, spread = _spread([score(t["measures"][split][str(TEACHER_STEPS)]) for t in teachers])
        lines += [f"### {split.capitalize()} split: teacher {mean:.1f} ± {spread / 2:.1f}", "", "Operators:", ""]
        lines += [*table(rows((*CONTROLS, *GRID), split, seeds, runs)), "", "Restarts:", ""]
        lines += [*table(rows(RESTARTS, split, seeds, runs)), ""]
    return "\n".join(lines)


def main() -> None:
    """Trains what is missing, then writes results.json and the tables of README.md, and prints them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--data", type=Path, default=Path("data/demo"))
    parser.add_argument("--runs", type=Path, default=Path("runs/growth"))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    make_demo(options.data)
    seeds = range(options.seeds)
    first = dict.fromkeys(URGENT)
    rest = [variant for variant in dict.fromkeys((*GRID, *RESTARTS, *CONTROLS)) if variant not in first]
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for todo in ([DEFAULT], first, rest):
            jobs = {pool.submit(train, variant, seed, options.data, options.runs): (variant.name, seed)
                    for variant, seed in itertools.product(todo, seeds)}  # fmt: skip
            for number, job in enumerate(as_completed(jobs), 1):
                job.result()
                print(f"{number}/{len(jobs)}", *jobs[job], file=sys.stderr, flush=True)
    tables = report(options.seeds, options.runs)
    results = [json.loads(path.read_text()) for path in sorted(options.runs.glob("*-seed?.json"))]
    machine = f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, torch {torch.__version__}"
    _write(HERE / "results.json", {"machine": machine, "date": time.strftime("%Y-%m-%d"), "runs": results})
    page = (HERE / "README.md").read_text()
    (HERE / "README.md").write_text(page[: page.index(TABLES)] + TABLES + "\n\n" + tables)
    print(tables)


if __name__ == "__main__":
    main()
