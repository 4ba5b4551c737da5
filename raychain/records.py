"""The records of runs, stages, checkpoints and searches, as they are read.

Another version, a person or a damaged disk may have written them, so each is checked against its model: a field of
another kind counts as absent, and a record without a field that it needs is none. What is returned is the file's own
content, a dict, so that what is written again stays as it was.
"""

from __future__ import annotations

import json
import logging
import os
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pyarrow import fs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raychain.core.storage import Folder

log = logging.getLogger("raychain.records")

DEEPEST = 64
"""Levels of a record; its own have a quarter of that."""
MOST = 1e40
"""No quantity is larger."""

Number = Annotated[float, Field(ge=-MOST, le=MOST, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**63)]
Metrics = dict[str, Number | None]


class Record(BaseModel):
    """A JSON object with at least these fields; none is converted, and others may stand beside them."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TallyRecord(Record):
    """What was found unusable in a shard."""

    counts: dict[str, Count]
    examples: list[Annotated[list[str], Field(min_length=2, max_length=3)]]


class CountRecord(Record):
    """What counting a shard found."""

    samples: Count
    bad: TallyRecord
    former: str


class FailureRecord(Record):
    """A row of a table that gave no picture."""

    row: Count
    image: str
    reason: str


class PackedRecord(Record):
    """What `data build` packed into a shard."""

    rows: Count
    samples: Count
    bytes: Count
    failed: list[FailureRecord]


class MeasuredRecord(Record):
    """What one evaluator measured of a stage."""

    name: str | None = None
    metrics: Metrics


class OriginRecord(Record):
    """The checkpoint that a stage is, or starts from."""

    checkpoint: str
    model: str
    digest: str


class StageRecord(Record):
    """stage.json, and a stage in run.json."""

    key: str
    files: dict[str, str] | None = None
    index: Count | None = None
    model: str | None = None
    status: str | None = None
    epochs: Number | None = None
    steps: Count | None = None
    samples_seen: Count | None = None
    params: Count | None = None
    macs: Number | None = None
    wall_s: Number | None = None
    gap_s: Number | None = None
    data_wait_s: Number | None = None
    lr: Number | None = None
    changes: list[dict[str, Number]] | None = None
    transfer: dict[str, Any] | None = None
    checkpoint: str | None = None
    origin: OriginRecord | None = None
    metrics: Metrics | None = None
    evaluation: str | None = None
    evaluations: dict[str, MeasuredRecord] | None = None
    published: Number | None = None
    former: str | None = None


class CountersRecord(BaseModel):
    """The counters of a checkpoint."""

    model_config = ConfigDict(strict=True, extra="forbid")
    step: Count
    samples: Count
    wall_s: Number
    data_wait_s: Number
    gap_s: Number | None = None


class CheckpointRecord(Record):
    """state.json of a checkpoint."""

    key: str
    counters: CountersRecord | None = None
    files: dict[str, str] | None = None


class RestartRecord(Record):
    """A restart in run.json."""

    time: Number
    reason: str
    workers: Count
    message: str


class EvaluationRecord(Record):
    """A measurement in run.json."""

    time: Number
    stage: Count
    step: Count
    metrics: Metrics


class HealthRecord(Record):
    """What of the data cannot be used, in run.json."""

    decoded: dict[str, TallyRecord] | None = None


class ConfigRecord(Record):
    """The experiment in run.json."""

    data: dict[str, Any] | None = None
    evaluate: dict[str, Any] | None = None


class RunRecord(Record):
    """run.json."""

    name: str | None = None
    status: str | None = None
    config: ConfigRecord | None = None
    stages: list[StageRecord] | None = None
    restarts: list[RestartRecord] | None = None
    evaluations: list[EvaluationRecord] | None = None
    data_health: HealthRecord | None = None


class StepRecord(Record):
    """A line of metrics.jsonl."""

    time: Number
    stage: Count
    step: Count


class BarRecord(Record):
    """A span in trace.json."""

    ph: Literal["X"]
    name: str
    cat: str
    ts: Annotated[Number, Field(ge=0)]
    dur: Annotated[Number, Field(ge=0)]


class TraceRecord(Record):
    """trace.json."""

    traceEvents: list[Any]  # noqa: N815 - Chrome's name


class TrackRecord(Record):
    """What was logged to a tracker."""

    id: str
    target: str
    key: str
    logged: dict[str, Count]


class ClaimRecord(Record):
    """A driver's claim on a lease."""

    host: str = "unknown"
    pid: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    process: str = ""
    held: bool = True


class TrialRecord(Record):
    """A trial of a search."""

    number: Annotated[int, Field(ge=0, le=10**9)]
    kind: Literal["planned", "sampled", "control", "equal-macs", "full"]
    params: dict[str, Any]
    status: str
    reason: str | None = None
    reached: Count | None = None


class PassedRecord(Record):
    """Chains that passed a rung of a search."""

    rung: Count
    values: dict[str, Number]


class VerdictRecord(BaseModel):
    """Why chains of a search ended early."""

    model_config = ConfigDict(strict=True, extra="forbid")
    macs: Number
    value: Number
    needed: Number
    rivals: Count


class HalvingRecord(Record):
    """The state of `asha`."""

    passed: list[PassedRecord]
    behind: dict[str, VerdictRecord]


class SearchRecord(Record):
    """search.json."""

    identity: str
    trials: list[TrialRecord] | None = None
    trained: list[str] | None = None
    begun: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], list[str]] | None = None
    asha: HalvingRecord | None = None


Kind = TypeVar("Kind", bound=Record)


def read(folder: Folder, name: str, kind: type[Kind], *, quiet: bool = False) -> dict[str, Any] | None:
    """The record in a file; None where there is none, or none that can be used, of which a warning tells.

    Raises OSError where the folder cannot be read.
    """
    record, problem = examine(folder, name, kind)
    if problem and not quiet:
        warn(f"{name} in {folder.address} {problem}")
    return record


def take(folder: Folder, name: str, kind: type[Kind]) -> dict[str, Any] | None:
    """The record that `read` gives, for who writes the file next: one that cannot be used is kept beside it."""
    record, problem = examine(folder, name, kind)
    if problem and record is None:
        problem += f"; kept as {set_aside(folder, name)}"
    if problem:
        warn(f"{name} in {folder.address} {problem}")
    return record


def set_aside(folder: Folder, name: str) -> str:
    """Moves what stands at `name` to the first free `<name>.damaged-N`, which is returned. Raises OSError."""
    parent, _, base = name.rpartition("/")
    taken = set(folder.list(parent))
    free = next(new for n in range(1, len(taken) + 2) if (new := f"{base}.damaged-{n}") not in taken)
    folder.fs.move(folder.join(name), folder.join(f"{parent}/{free}" if parent else free))
    return free


def document(content: bytes) -> Any:
    """What the JSON says; None where it is none, or is nested too deep for a record."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    level, depth = [found], 0
    while level and depth <= DEEPEST:
        level = [inner for value in level for inner in _inner(value)]
        depth += 1
    return None if level else found


def parse(content: bytes, kind: type[Kind]) -> dict[str, Any] | None:
    """The record that the JSON says; None where it is none."""
    return clean(document(content), kind)[0]


def clean(value: Any, kind: type[Kind]) -> tuple[dict[str, Any] | None, list[str]]:
    """A record without its fields of a wrong kind, and their names; None where one of them is needed."""
    if not isinstance(value, dict):
        return None, []
    try:
        kind.model_validate({name: field for name, field in value.items() if name in kind.model_fields})
    except ValidationError as error:
        wrong = list(dict.fromkeys(str(problem["loc"][0]) for problem in error.errors(include_url=False)))
        needed = any(kind.model_fields[name].is_required() for name in wrong if name in kind.model_fields)
        return (None if needed else {k: v for k, v in value.items() if k not in wrong}), wrong
    return value, []


def is_a(value: Any, kind: type[Kind]) -> bool:
    """Whether all its fields are of their kinds."""
    found, wrong = clean(value, kind)
    return found is not None and not wrong


def is_taken(folder: Folder, name: str) -> bool:
    """Whether anything has the name, a link that leads nowhere too."""
    return folder.exists(name) or (folder.local and os.path.lexists(folder.join(name)))


def content(folder: Folder, name: str) -> bytes | None:
    """What a file holds; None where there is none, or where something else than a file has its name."""
    if folder.fs.get_file_info(folder.join(name)).type != fs.FileType.File:
        return None
    return folder.read(name)


def examine(folder: Folder, name: str, kind: type[Kind]) -> tuple[dict[str, Any] | None, str]:
    """The record that `read` gives, with what is wrong with it; nothing where there is no file."""
    found = content(folder, name)
    if found is None:
        return None, "is no file" if is_taken(folder, name) else ""
    value = document(found)
    if value is None:
        return None, "is not JSON, or nested too deep"
    record, wrong = clean(value, kind)
    if record is None:
        return None, f"names no {' and no '.join(wrong)}" if wrong else "is no JSON object"
    return record, f"has something else than it should in {', '.join(map(repr, wrong))}" if wrong else ""


def _inner(value: Any) -> list[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in values if isinstance(inner, dict | list)]


@cache
def warn(message: str) -> None:
    """Logs it once a process, as several readers may meet the same record."""
    log.warning("%s", message)
