"""Weights & Biases and MLflow, beside the TensorBoard files; each on a thread of the driver, so training never waits.

A tracker's run belongs to the run folder: `track-<name>.json` there holds its id and each stage's last logged step, and
the same command again continues it. Another target (project, URI) or chain in the same folder begins another run.
Trackers only append: steps that a resumed stage trains again are not logged again, their first values stay.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from queue import SimpleQueue
from typing import Any, NamedTuple

from raychain import records
from raychain.config.experiment import Experiment, Track
from raychain.core.json import Json, plain
from raychain.core.storage import Folder
from raychain.errors import InputError, without_secrets
from raychain.events import Evaluated, Event, Listener, Step, Warned

DISTRIBUTIONS = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
FINISH_S = 60.0  # how long a run that is over waits for its trackers


def check_trackers(track: Track) -> None:
    """InputError for a tracker that is not installed, and for W&B where nobody is logged in."""
    for name, distribution in DISTRIBUTIONS.items():
        if target := getattr(track, name):
            try:
                metadata.distribution(distribution)
            except metadata.PackageNotFoundError:
                allowed = f"a tracker that is installed; {distribution} is not"
                raise InputError(f"track.{name}", target, allowed, f"pip install 'raychain[{name}]'") from None
    if track.wandb:
        import wandb

        # without an account wandb.init would ask on the terminal, in the middle of the run
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            fix = "wandb login, set WANDB_API_KEY, or WANDB_MODE=offline"
            raise InputError("track.wandb", track.wandb, "a machine that is logged in to Weights & Biases", fix)


@dataclass(frozen=True)
class Subject:
    """What a tracker's run is about: its id, the run folder, the experiment, optimiser steps of each stage."""

    id: str
    target: str
    name: str
    folder: str | None
    config: Json
    steps: Sequence[int]


class WeightsAndBiases:
    """Curves over `stage<index>/samples`; W&B's own step is the optimiser step of the chain."""

    def __init__(self, subject: Subject) -> None:
        import wandb

        entity, _, project = subject.target.rpartition("/")
        self._run = wandb.init(
            entity=entity or None,
            project=project,
            id=subject.id,
            name=subject.name,
            resume="allow",
            reinit="create_new",
            dir=os.environ.get("WANDB_DIR") or subject.folder,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.config.update(subject.config, allow_val_change=True)
        for stage in range(len(subject.steps)):
            self._run.define_metric(f"stage{stage}/*", step_metric=f"stage{stage}/samples")

    def log(self, row: Mapping[str, float], step: int, samples: int) -> None:  # noqa: ARG002 - samples are in the row
        # W&B drops rows below its own step, which is one further after every row
        self._run.log(dict(row), step=max(step, self._run.step), commit=True)

    def finish(self, status: str, totals: Mapping[str, float]) -> None:
        self._run.summary.update({"status": status, **totals})
        self._run.finish(exit_code=0 if status == "succeeded" else 1)


class MLflow:
    """Metrics over the stage's samples, in MLflow's experiment MLFLOW_EXPERIMENT_NAME or the experiment's name."""

    def __init__(self, subject: Subject) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._log = logging.getLogger("mlflow")
        self._level = self._log.level
        self._log.setLevel(logging.ERROR)
        self._client = MlflowClient(tracking_uri=subject.target)
        name, tag = os.environ.get("MLFLOW_EXPERIMENT_NAME") or subject.config["name"], "raychain.run"
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        if found := self._client.search_runs([experiment], f"tags.`{tag}` = '{subject.id}'", max_results=1):
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(experiment, tags={tag: subject.id}, run_name=subject.name).info.run_id
        params = [Param(key, str(value)) for key, value in _leaves(subject.config)]
        for start in range(0, len(params), 100):  # no more at once
            self._client.log_batch(self._id, params=params[start : start + 100])

    def log(self, row: Mapping[str, float], step: int, samples: int) -> None:  # noqa: ARG002 - over samples
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, samples) for name, value in row.items()])

    def finish(self, status: str, totals: Mapping[str, float]) -> None:
        self.log(totals, 0, 0)
        self._client.set_tag(self._id, "status", status)
        self._client.set_terminated(self._id, {"succeeded": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED"))
        self._log.setLevel(self._level)


TRACKERS: dict[str, type[WeightsAndBiases] | type[MLflow]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}


class _End(NamedTuple):
    """The run is over."""

    status: str
    totals: Mapping[str, float]


Line = SimpleQueue[Step | Evaluated | _End]


class Trackers(Listener):
    """Hands events to the trackers that `track` names; what goes wrong there is one warning, passed to `warn`.

    `key` is the chain's (its last stage's), `steps` the optimiser steps of each stage.
    """

    def __init__(
        self, out: Folder, experiment: Experiment, key: str, steps: Sequence[int], warn: Callable[[Event], None]
    ) -> None:
        self._out, self._experiment, self._key, self._steps, self._warn = out, experiment, key, steps, warn
        self._lines: list[tuple[str, threading.Thread, Line]] = []
        for name in TRACKERS:
            if target := getattr(experiment.track, name):
                events: Line = SimpleQueue()
                thread = threading.Thread(target=self._serve, args=(name, target, events), name=name, daemon=True)
                self._lines.append((name, thread, events))
                thread.start()

    def step(self, event: Step) -> None:
        """Takes a step; returns at once."""
        self._put(event)

    def evaluated(self, event: Evaluated) -> None:
        """Takes a measurement; returns at once."""
        self._put(event)

    def _put(self, event: Step | Evaluated | _End) -> None:
        for _, thread, events in self._lines:
            if thread.is_alive():
                events.put(event)

    def finish(self, status: str, totals: Mapping[str, float]) -> None:
        """Closes the trackers' runs; waits at most FINISH_S."""
        self._put(_End(status, {f"totals/{k}": v for k, v in totals.items()}))
        deadline = time.monotonic() + FINISH_S
        for name, thread, _ in self._lines:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self._tell(name, f"did not take everything within {FINISH_S:g} s")

    def _tell(self, name: str, problem: str) -> None:
        self._warn(Warned(f"track.{name}: {problem}"))

    def _serve(self, name: str, target: str, events: Line) -> None:
        try:
            self._track(name, target, events)
        except Exception as error:  # a tracker is no reason to lose a run
            self._tell(name, f"{str(error).strip() or type(error).__name__}; nothing more is logged there")

    def _track(self, name: str, target: str, events: Line) -> None:
        file, shown = f"track-{name}.json", without_secrets(target)
        state = records.take(self._out, file, records.TrackRecord)
        if state is None or (state.target, state.key) != (shown, self._key):
            state = records.TrackRecord(id=uuid.uuid4().hex[:12], target=shown, key=self._key, logged={})
            records.write(self._out, file, state)
        run, folder = self._out.path.rstrip("/").rpartition("/")[2], self._out.path if self._out.local else None
        config = plain(self._experiment.model_dump(mode="json", exclude={"track"}))
        tracker = TRACKERS[name](Subject(state.id, target, run, folder, config, self._steps))
        while not isinstance(event := events.get(), _End):
            stage = f"stage{event.stage}"
            series = stage if isinstance(event, Step) else f"{stage}/evaluation"
            scalars = event.scalars() if isinstance(event, Step) else event.metrics
            if event.step > state.logged.get(series, -1):
                row = {f"{series}/{key}": value for key, value in scalars.items() if value is not None}
                samples = event.step * self._experiment.train.global_batch
                row[f"{stage}/samples"] = samples
                tracker.log(row, sum(self._steps[: event.stage]) + event.step, samples)
                state.logged[series] = event.step
                with contextlib.suppress(Exception):  # the storage may be back for the next
                    records.write(self._out, file, state)
        tracker.finish(event.status, event.totals)


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested mappings and lists, by their dotted paths."""
    if not isinstance(value, dict | list):
        return [(path, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for key, inner in items for leaf in _leaves(inner, f"{path}.{key}" if path else str(key))]
