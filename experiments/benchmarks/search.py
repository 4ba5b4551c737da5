"""What a search costs beside training: `python experiments/benchmarks/search.py 1000 --out search.json`.

So many trials whose stages are there at once, on one worker group: seconds and CPU seconds of the driver a trial, its
memory by the number of trials, and that of the trials' processes while as many wait as may. `--plain` measures Ray Tune
alone, with as many trials of a function that reports one number.
"""

from __future__ import annotations

import argparse
import json
import queue
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import tune

import raychain
from raychain.config.loading import validate
from raychain.demo import make_demo
from raychain.records import StageEntry
from raychain.searching import driver
from raychain.searching.campaign import Job, JobEnded, Notice, StageDone


class Instant:
    """Trains nothing: a stage is there as soon as it is wanted, or after `WAIT_S`."""

    wait_s = 0.0

    def __init__(self, plan: Any, progress: Any, *, verbose: bool) -> None:  # noqa: ARG002
        self._notices: queue.SimpleQueue[Notice] = queue.SimpleQueue()

    def start(self, job: Job) -> None:
        threading.Timer(self.wait_s, self._end, [job]).start()

    def _end(self, job: Job) -> None:
        task = job.trial.task
        for stage in task.stages:
            if stage.key in job.keys:
                metrics = {"zero_shot_top1": int(stage.key[:6], 16) / 2**24}
                record = StageEntry(key=stage.key, status="trained", metrics=metrics, evaluation=task.suite.digest)
                self.put(StageDone(job, stage.key, record))
        self.put(JobEnded(job))

    def wait(self) -> Notice:
        return self._notices.get()

    def put(self, notice: Notice) -> None:
        self._notices.put(notice)

    def cut(self, job: Job) -> None:
        """There is nothing to cut."""

    def stop(self) -> None:
        """There is nothing to stop."""


def experiment(work: Path, trials: int, sampler: str, models: str) -> Any:
    space = {"models": models, "first": {"low": 10, "high": 200, "step": 1},
             "grown": {"low": 1, "high": 20, "step": 0.5}}  # fmt: skip
    search = {"trials": trials, "seeds": 0, "sampler": sampler, "controls": None, "space": space}
    return validate({
        "name": "cost", "data": {"train": str(work / "demo/train"), "captions": {"keys": ["txt"], "per_image": 1}},
        "family": models, "train": {"global_batch": 32, "warmup": "2 steps", "precision": "fp32"},
        "compute": {"workers": 1, "cpus_per_worker": 1}, "preload": {"cache": str(work / "cache")},
        "evaluate": {"zero_shot": str(work / "demo/zero_shot/test")}, "storage": str(work / f"{sampler}-{trials}"),
        "search": search,
    })  # fmt: skip


def plain(folder: Path, trials: int) -> int:
    """Ray Tune without raychain, one trial after the other. Returns the number of its trials."""

    def report(config: dict[str, float]) -> None:
        tune.report({"zero_shot_top1": config["x"]})

    ray.init("local", include_dashboard=False)
    settings = tune.TuneConfig(num_samples=trials, max_concurrent_trials=1, reuse_actors=True)
    run = tune.RunConfig(name="plain", storage_path=str(folder), verbose=0)
    results = tune.Tuner(report, param_space={"x": tune.uniform(0, 1)}, tune_config=settings, run_config=run).fit()
    ray.shutdown()
    return len(results)


def watched(search: Callable[[], int]) -> dict[str, Any]:
    """A search that returns the number of its trials, with the driver's memory by time, and the most that all trials'
    processes have.
    """
    process, over = psutil.Process(), threading.Event()
    memory: list[float] = []
    trials: list[float] = []

    def look() -> None:
        while not over.wait(1.0):
            memory.append(process.memory_info().rss / 2**20)
            found = [p for p in process.children(recursive=True) if "ImplicitFunc" in p.name() or "chain" in p.name()]
            trials.append(sum(p.memory_full_info().pss for p in found) / 2**20)

    threading.Thread(target=look, daemon=True).start()
    began, cpu = time.time(), resource.getrusage(resource.RUSAGE_SELF)
    count = search()
    took, used = time.time() - began, resource.getrusage(resource.RUSAGE_SELF)
    over.set()
    spent = used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime
    return {
        "trials": count, "seconds_a_trial": took / count, "driver_cpu_s_a_trial": spent / count,
        "driver_mib_by_tenths": [round(memory[i * (len(memory) - 1) // 10]) for i in range(11)],
        "trial_processes_mib": max(trials),
    }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("trials", type=int)
    options.add_argument("--sampler", default="random")
    options.add_argument("--groups", type=int, default=1, help="worker groups at once; 22 let 24 trials wait")
    options.add_argument("--wait-s", type=float, default=0.0)
    options.add_argument("--models", default="CoM-micro-{S,M,L}")
    options.add_argument("--plain", action="store_true", help="Ray Tune alone")
    options.add_argument("--out", type=Path)
    asked = options.parse_args()
    driver.RayRunner, Instant.wait_s = Instant, asked.wait_s  # type: ignore[assignment,misc]
    driver.slots = lambda _: asked.groups
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if asked.plain:
            found = watched(lambda: plain(work, asked.trials))
        else:
            make_demo(work / "demo", names=30, pictures=1000, held_out=100, per_name=3)
            config = experiment(work, asked.trials, asked.sampler, asked.models)
            found = watched(lambda: len(raychain.search(config).record["trials"]))
    print(json.dumps(found, indent=2))
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
