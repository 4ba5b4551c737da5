"""The searches of micro.py without training: `python experiments/search/replay.py WORK --schedule wsd --speed 6`.

A stage takes the time of its MACs on the machine of the README, divided by `speed`, and has the metrics that
results.json has of its chain, so that the searcher, Ray Tune and the sharing of stages do what they do in the search.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import threading
import time
from pathlib import Path
from typing import Any

import raychain
from raychain.config.loading import load_experiment
from raychain.demo import make_demo
from raychain.records import StageEntry
from raychain.searching import driver
from raychain.searching.campaign import Job, JobEnded, Notice, StageDone

HERE = Path(__file__).parent
METRIC = "zero_shot_top1"
MACS_A_SECOND = 18e9
"""MACs a second of one worker group: 33 TMACs in 15 minutes on two."""


class Recorded:
    """Trains nothing: waits, then has the metrics that were recorded."""

    speed = 1.0
    known: dict[tuple[Any, ...], float]
    by_first: dict[tuple[str, float], list[float]]

    def __init__(self, plan: Any, progress: Any, *, verbose: bool) -> None:  # noqa: ARG002
        self._notices: queue.SimpleQueue[Notice] = queue.SimpleQueue()

    @classmethod
    def read(cls, trials: list[dict[str, Any]]) -> None:
        """The table."""
        cls.known, cls.by_first = {}, {}
        for trial in trials:
            chain = [(stage["model"], stage["epochs"]) for stage in trial["chain"]]
            cls.known[*chain, trial["macs"]] = trial["validation"]
            cls.by_first.setdefault(chain[0], []).append(trial["validation"])

    def start(self, job: Job) -> None:
        threading.Thread(target=self._work, args=[job], daemon=True).start()

    def _work(self, job: Job) -> None:
        task = job.trial.task
        for step in job.trial.path:
            if step.key not in job.keys:
                continue
            time.sleep(step.share * step.stage.macs / MACS_A_SECOND / self.speed)
            chain = [(stage.model, stage.epochs) for stage in task.stages[: step.place + 1]]
            like = self.by_first.get(chain[0], [20.0])
            usual = sum(like) / len(like) + chain[-1][1] - 3
            value = self.known.get((*chain, sum(stage.macs for stage in task.stages[: step.place + 1])), usual)
            metrics = {METRIC: value} if step.whole else None
            record = StageEntry(key=step.key, status="trained", metrics=metrics, evaluation=task.suite.digest)
            self.put(StageDone(job, step.key, record))
        self.put(JobEnded(job))

    def wait(self) -> Notice:
        return self._notices.get()

    def put(self, notice: Notice) -> None:
        self._notices.put(notice)

    def cut(self, job: Job) -> None:
        """Nobody stops chains here."""

    def stop(self) -> None:
        """There is nothing to save."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--schedule", choices=["cosine", "wsd"], default="cosine")
    parser.add_argument("--speed", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    make_demo(work / "data/search-demo", names=60, pictures=1_000, held_out=200, per_name=20)
    Recorded.speed = options.speed
    Recorded.read(json.loads((HERE / "results.json").read_text())[options.schedule]["trials"])
    driver.RayRunner = Recorded  # type: ignore[assignment,misc]
    name = f"{options.schedule}-{options.seed}-{time.time():.0f}"
    settings = (f"train.schedule={options.schedule}", f"storage={work / name}", f"search.seed={options.seed}")
    began = time.time()
    found = raychain.search(load_experiment(str(HERE / "micro.yaml"), settings), out=str(work / name / "search"))
    seconds = time.time() - began
    record = found.record
    ratio = record["stage_epochs_trained"] / record["stage_epochs_requested"]
    print(json.dumps({"schedule": options.schedule, "seed": options.seed, "seconds": round(seconds, 1),
                      "trials": len(record["trials"]), "ratio": round(ratio, 4),
                      "of_chains": record["stage_epochs_of_chains"],
                      "best": [(s["model"], s["epochs"]) for s in record["best"]["chain"]]}))  # fmt: skip


if __name__ == "__main__":
    main()
