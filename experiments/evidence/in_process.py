"""Trains a chain in this process, by what each of Ray's workers runs, for studies whose stages take seconds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from raychain.config.loading import opened, validate
from raychain.core.storage import Folder
from raychain.events import Event, Span, StageStarted
from raychain.runs.resolve import make_task
from raychain.runs.store import StageStore
from raychain.training.stage import ChainWorker


def train_here(file: Path, work: Path) -> list[dict[str, Any]]:
    """The stages of an experiment file, as run.json has them, with `cpu_s`: seconds of this process's threads.

    Finished stages are shared through the storage of the experiment, and their seconds are those of their training;
    a stage that goes on from the shared beginning of a shorter one counts as if it had made all steps at its own speed.
    """
    experiment = opened(validate(yaml.safe_load(file.read_text())))
    storage, out = str(experiment.storage), str(Path(str(experiment.storage)) / experiment.name)
    store, folder = StageStore(Folder(storage)), Folder(out)
    task = make_task(experiment, out, store=storage)
    seconds = work / "seconds"
    seconds.mkdir(exist_ok=True)
    for stage in task.stages:
        store.adopt(stage.key, folder, stage.folder, {"index": stage.index})
    begun = share = 0.0

    def emit(event: Event) -> None:
        nonlocal begun, share
        if isinstance(event, StageStarted):
            begun, share = time.process_time(), 1 - event.start_step / event.steps
        elif isinstance(event, Span) and event.category == "stage" and event.stage is not None:
            (seconds / task.stages[event.stage].key).write_text(f"{(time.process_time() - begun) / share:.2f}")

    if not ChainWorker(task, torch.device("cpu"), emit, lambda: False).run():
        raise SystemExit(f"{file.name} was stopped")
    found = []
    for stage in task.stages:
        store.contribute(stage.key, folder, stage.folder)
        record = json.loads((Path(out) / "stages" / stage.folder / "stage.json").read_text())
        found.append(record | {"cpu_s": float((seconds / stage.key).read_text())})
    return found
