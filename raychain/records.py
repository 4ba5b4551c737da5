"""The records of runs, stages, checkpoints and searches: every file that raychain writes for itself to read again.

`raychain.core.record` says how they are read and written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from raychain.core.json import Json, plain
from raychain.core.record import (
    Record,
    Version,
    Versioned,
    clean,
    content,
    document,
    examine,
    is_a,
    is_taken,
    parse,
    read,
    set_aside,
    show,
    take,
    warn,
    write,
)  # fmt: skip

__all__ = [
    "Record", "clean", "content", "document", "examine", "is_a", "is_taken", "parse", "read", "set_aside", "show",
    "take", "warn", "write",
]  # fmt: skip

MOST = 10**40
"""No quantity is larger."""

if TYPE_CHECKING:
    Number = float
else:  # whole numbers stay what they are, however large
    Number = (
        Annotated[int, Field(ge=-MOST, le=MOST)]
        | Annotated[float, Field(ge=-float(MOST), le=float(MOST), allow_inf_nan=False)]
    )
Count = Annotated[int, Field(ge=0, le=2**63)]
Metrics = dict[str, Number | None]


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

    shard: Count | None = None
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


class ChangeRecord(Record):
    """Another peak learning rate from a step of a stage on."""

    step: Count
    lr: Number


class StageEntry(Record):
    """A stage in run.json."""

    index: Count | None = None
    model: str | None = None
    key: str
    status: str | None = None
    epochs: Number | None = None
    steps: Count | None = None
    samples_seen: Count | None = None
    params: Count | None = None
    macs: Number | None = None
    wall_s: Number | None = None
    gap_s: Number | None = None
    first_step_s: Number | None = None
    data_wait_s: Number | None = None
    lr: Number | None = None
    changes: list[ChangeRecord] | None = None
    transfer: Json | None = None
    checkpoint: str | None = None
    origin: OriginRecord | None = None
    metrics: Metrics | None = None
    evaluation: str | None = None
    evaluations: dict[str, MeasuredRecord] | None = None
    published: Number | None = None
    former: str | None = None


class StageRecord(StageEntry, Versioned):
    """stage.json."""

    files: dict[str, str] | None = None

    def entry(self, *, metrics: Mapping[str, float], **own: Any) -> StageEntry:
        """The stage as run.json has it, with these metrics and fields of the run's own."""
        found = self.content()
        found |= plain({"metrics": metrics, **own})
        return StageEntry.of({name: value for name, value in found.items() if name not in ("schema", "files")})


class CountersRecord(Record):
    """The counters of a checkpoint."""

    model_config = ConfigDict(extra="forbid")
    step: Count
    samples: Count
    wall_s: Number
    data_wait_s: Number
    gap_s: Number | None = None
    first_step_s: Number | None = None


class CheckpointRecord(Record):
    """state.json of a checkpoint."""

    key: str
    counters: CountersRecord | None = None
    files: dict[str, str] | None = None
    former: str | None = None


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

    shards: Count | None = None
    samples: Count | None = None
    bad: dict[str, Count] | None = None
    examples: list[dict[str, str]] | None = None
    decoded: dict[str, TallyRecord] | None = None
    """What only decoding found, by shard identity."""


class TotalsRecord(Record):
    """What a chain costs in all, in run.json."""

    macs: Number | None = None
    baseline_macs: Number | None = None
    percent_of_baseline: Number | None = None
    speedup: Number | None = None
    wall_s: Number | None = None


class ConfigRecord(Record):
    """The experiment in run.json."""

    data: Json | None = None
    evaluate: Json | None = None
    task: Json | None = None


class RunRecord(Versioned):
    """run.json."""

    name: str | None = None
    status: str | None = None
    config: ConfigRecord | None = None
    environment: Json | None = None
    metrics: Json | None = None
    """The definition of every metric, by name."""
    score: str | None = None
    stages: list[StageEntry] | None = None
    totals: TotalsRecord | None = None
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
    counter: int | None = None
    """Renewals, so that the file changes with each."""
    held: bool = True


class ChainedRecord(Record):
    """A stage of a trial's chain."""

    model: str
    epochs: Number


class TrialRecord(Record):
    """A trial of a search."""

    number: Annotated[int, Field(ge=0, le=10**9)]
    kind: Literal["planned", "sampled", "control", "equal-macs", "full"]
    chain: list[ChainedRecord] | None = None
    transfer: Json | None = None
    macs: Number | None = None
    metrics: Metrics | None = None
    status: str
    reason: str | None = None
    reached: Count | None = None
    params: Json
    keys: list[str] | None = None


class PassedRecord(Record):
    """Chains that passed a rung of a search."""

    rung: Count
    macs: Number | None = None
    values: dict[str, Number]


class VerdictRecord(Record):
    """Why chains of a search ended early."""

    model_config = ConfigDict(extra="forbid")
    macs: Number
    value: Number
    needed: Number
    rivals: Count


class HalvingRecord(Record):
    """The state of `asha`."""

    passed: list[PassedRecord]
    behind: dict[str, VerdictRecord]


class BaselineRecord(Record):
    """The model alone against which a search compares."""

    model: str | None = None
    epochs: Number | str | None = None
    macs: Number | None = None
    metrics: Metrics | None = None


class ComparedRecord(Record):
    """A model alone beside a search's best chain; its metric stands under the metric's name."""

    trial: Count
    epochs: Number
    macs: Number
    chain_is_ahead_by: Number


class ComparisonRecord(Record):
    """A search's best chain against one model alone."""

    model: str
    at_equal_macs: ComparedRecord | None = None
    at_most: ComparedRecord | None = None


class CheckRecord(Record):
    """A chain of a search's proxy that was trained in full."""

    trial: Count
    full_trial: Count
    proxy: Number
    full: Number


class ProxyRecord(Record):
    """How well a search's proxy ranks chains; its settings stand beside these fields."""

    checked: list[CheckRecord] | None = None
    rank_correlation: Number | None = None


class SearchRecord(Versioned):
    """search.json. Searches of schema 1 go on where their settings are the same and their data is untouched."""

    SCHEMA: ClassVar[int] = 2
    version: Version = Field(default=2, alias="schema")
    name: str | None = None
    status: str | None = None
    identity: str
    metric: str | None = None
    metrics: Json | None = None
    """The definition of every metric, by name."""
    config: Json | None = None
    space_size: Count | None = None
    trials: list[TrialRecord] | None = None
    pareto: list[TrialRecord] | None = None
    best: TrialRecord | None = None
    baseline: BaselineRecord | None = None
    comparisons: list[ComparisonRecord] | None = None
    stage_epochs_requested: Number | None = None
    stage_epochs_trained: Number | None = None
    stage_epochs_of_chains: dict[str, Number] | None = None
    proxy: ProxyRecord | None = None
    asha: HalvingRecord | None = None
    tune: dict[str, str] | None = None
    """Versions of the programs that wrote the folder `tune`."""
    trained: list[str] | None = None
    begun: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], list[str]] | None = None
