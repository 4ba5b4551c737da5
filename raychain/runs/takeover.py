"""Stages that schema 2 finished are taken over under their keys of today, unless their data was touched since.

Schema 2 told shards by their size and three probes, so its key alone does not say that a stage was trained on what the
shards hold now. A stage counts where no shard that it or a stage before it reads was touched after its training began,
and where the stage before was taken over as well. Its files stay as they are; the former key stands in the record.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

from pyarrow import fs

from raychain import records
from raychain.core.storage import Folder
from raychain.records import StageRecord
from raychain.reporting.runlog import METRICS
from raychain.runs.store import STORE, StageStore, UnusableStageError
from raychain.training.checkpoint import MARKER
from raychain.training.finished import STAGE_RECORD
from raychain.training.task import ChainTask, StageTask

Say = Callable[[str], None]


class Found(NamedTuple):
    """A finished stage of schema 2."""

    folder: Folder
    name: str
    record: StageRecord
    began: float
    """When its training began at the latest, seconds since 1970."""


def take_over(task: ChainTask, out: Folder, store: StageStore | None, say: Say) -> None:
    """Takes over what schema 2 left of the chain, finished or not, in the run folder and the store.

    `say` hears a line of every stage that is, or that is not although it is there. Raises OSError.
    """
    for stage in (stage for stage in task.stages if stage.given is None):
        name = f"stages/{stage.folder}"
        if _key(out, name) == stage.key or (store and store.has(stage.key)):
            continue
        found = _in_run(stage, out, store)
        if found is None and store:
            take_over_in_store(task, stage, store, say, out)
        elif found is None:
            _take_over_checkpoints(stage, out, store)
        elif why := _refused(stage, found.began, out, store):
            say(f"{_named(stage)} is trained again: {why}")
        else:
            records.write(out, f"{name}/{STAGE_RECORD}", _renamed(task, stage, found))
            say(f"{_named(stage)} was trained by an earlier version: taken over as {stage.key[:8]}")


def take_over_in_store(
    task: ChainTask, stage: StageTask, store: StageStore, say: Say, out: Folder | None = None
) -> None:
    """The same of one stage that only the store has; unfinished states are looked for where `out` is given."""
    found = _in_store(stage, store)
    if found is None:
        if out is not None:
            _take_over_checkpoints(stage, out, store)
    elif why := _refused(stage, found.began, out, store):
        say(f"{_named(stage)} is trained again: {why}")
    else:
        try:
            store.rename(stage.former.key, _renamed(task, stage, found))
        except UnusableStageError as damage:
            say(f"{_named(stage)} is trained again: {found.name} in {found.folder.address}: {damage}")
        else:
            say(f"{_named(stage)} was trained by an earlier version: taken over as {stage.key[:8]}")


def finished(task: ChainTask, out: Folder) -> list[bool]:
    """Whether the run folder has each stage, taken over or to be taken over; nothing is changed."""
    have: list[bool] = []
    for stage in task.stages:
        found = _in_run(stage, out, None)
        former = found is not None and not _touched(stage, found.began) and (not have or have[-1])
        have.append(_key(out, f"stages/{stage.folder}") == stage.key or former)
    return have


def _refused(stage: StageTask, began: float, out: Folder | None, store: StageStore | None) -> str:
    """Why a stage of schema 2 is not the one that is wanted; empty if it is."""
    if why := _touched(stage, began):
        return why
    if before := stage.former.before:
        found = [_read(out, f"stages/{before.folder}")] if out else []
        found += [_read(store.storage, f"{STORE}/{before.key}")] if store else []
        if not any(r and r.key == before.key and r.former == before.former for r in found):
            return "the stage before it is another or not there"
    return ""


def _touched(stage: StageTask, began: float) -> str:
    """Why the stage was trained on other data, as far as that can be told; empty if it was not."""
    if stage.feed.reader.kept != stage.former.pixels:
        return f"its pictures were kept as {stage.former.pixels} (data.store: {stage.former.pixels} leaves them so)"
    if stage.former.changed > began:
        return f"{stage.former.shard} was touched after the stage was trained"
    return ""


def _in_run(stage: StageTask, out: Folder, store: StageStore | None) -> Found | None:
    name = f"stages/{stage.folder}"
    record = _read(out, name)
    if record is None or record.key != stage.former.key:
        return None
    shared = _in_store(stage, store) if store else None
    times = [
        _logged(out, stage.index),
        _written(out, name) - (record.wall_s or 0),
        shared.began if shared else math.inf,
    ]
    return Found(out, name, record, min(times))


def _in_store(stage: StageTask, store: StageStore) -> Found | None:
    if not store.has(stage.former.key):
        return None
    name = f"{STORE}/{stage.former.key}"
    record = _read(store.storage, name)
    if record is None:
        return None
    return Found(store.storage, name, record, _written(store.storage, name) - (record.wall_s or 0))


def _renamed(task: ChainTask, stage: StageTask, found: Found) -> StageRecord:
    """The record under today's key. Metrics count where the held-out data was not touched either."""
    measured = task.suite.taken_over(found.record, found.began) or found.record.evaluation
    changes = {"key": stage.key, "former": stage.former.key, "evaluation": measured}
    return found.record.model_copy(update=changes)


def _take_over_checkpoints(stage: StageTask, out: Folder, store: StageStore | None) -> None:
    """Has the stage go on from its unfinished states."""
    folder = f"checkpoints/{stage.folder}"
    for step in out.list(folder):
        name = f"{folder}/{step}/{MARKER}"
        state = records.read(out, name, records.CheckpointRecord, quiet=True)
        if not step.isdigit() or state is None or state.key != stage.former.begun:
            continue
        if stage.changes and int(step) > stage.changes[0].step:  # it has gone on with the rate of before
            continue
        began = min(
            _logged(out, stage.index),
            _written(out, f"{folder}/{step}") - (state.counters.wall_s if state.counters else 0),
        )
        if not _refused(stage, began, out, store):
            state.key, state.former = stage.key_at(int(step)), stage.former.begun
            records.write(out, name, state)


def _logged(out: Folder, index: int) -> float:
    """When the run folder's stage logged its first step; infinite where it tells nothing. A copy tells it too."""
    for line in (records.content(out, METRICS) or b"").splitlines():
        found = records.parse(line, records.StepRecord)
        if found and found.stage == index:
            return found.time
    return math.inf


def _written(folder: Folder, name: str) -> float:
    """When the first file of a folder was written; minus infinity where nothing tells."""
    infos = folder.fs.get_file_info(fs.FileSelector(folder.join(name), allow_not_found=True))
    times = [info.mtime for info in infos if info.type == fs.FileType.File]
    return min((time.timestamp() for time in times if isinstance(time, datetime)), default=-math.inf)


def _key(folder: Folder, name: str) -> str | None:
    record = _read(folder, name)
    return record.key if record else None


def _read(folder: Folder, name: str) -> StageRecord | None:
    return records.read(folder, f"{name}/{STAGE_RECORD}", StageRecord, quiet=True)


def _named(stage: StageTask) -> str:
    return f"{stage.model} (stage {stage.former.key[:8]})"
