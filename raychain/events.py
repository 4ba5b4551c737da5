"""What happens in a run, as frozen types, and the listeners that hear of it.

Workers make events (rank 0 alone; `BadSamples`, `Warned` and `WorkerStarted`: every rank), the driver adds its own and
hands all of them to its listeners. Stages count from 0 within the chain. Values are plain Python, so that an event can
be pickled between processes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, assert_never

if TYPE_CHECKING:
    from raychain.data.health import Tally
    from raychain.records import StageEntry

Category = Literal["stage", "build", "preload", "evaluation", "checkpoint", "export", "restart"]
CATEGORIES: tuple[Category, ...] = ("stage", "build", "preload", "evaluation", "checkpoint", "export", "restart")
"""What a span can be, in the order of the timeline's rows."""
Reason = Literal["failure", "memory", "drain", "grow"]


@dataclass(frozen=True, slots=True)
class Timed:
    """Something that happened at `time`, in seconds since 1970."""

    time: float = field(default_factory=time.time, kw_only=True)


@dataclass(frozen=True, slots=True)
class StageStarted(Timed):
    """A worker group begins or resumes a stage."""

    stage: int
    model: str
    params: int
    steps: int
    """Steps of the whole stage."""
    start_step: int
    """Steps that were done before."""
    global_batch: int
    epoch_samples: int
    world_size: int
    cached_as: str | None = None
    """How the node's cache keeps pictures: `raw` or `jpeg`."""


@dataclass(frozen=True, slots=True)
class Step(Timed):
    """One logged optimiser step; a line of metrics.jsonl."""

    stage: int
    step: int
    """Optimiser steps done."""
    samples: int
    """Samples that the stage has seen, this step's included."""
    epoch: float
    loss: float
    task_loss: float
    distill_loss: float | None
    """The distillation's part of the loss, `alpha` included; 0 without a teacher."""
    alpha: float
    lr: float
    report: Mapping[str, float]
    """What the objective reports beside the losses, such as `logit_scale`."""
    samples_per_s: float
    """Since the logged step before."""
    data_wait_s: float
    """Seconds waited for data since the logged step before."""
    world_size: int

    sample_tokens: int = 0
    """Tokens of a sample; 0 where samples are no text."""

    @property
    def rate(self) -> tuple[float, str]:
        """How fast training goes, and in what."""
        if self.sample_tokens:
            return self.samples_per_s * self.sample_tokens, "tokens/s"
        return self.samples_per_s, "images/s"

    def scalars(self) -> dict[str, float | None]:
        """The curves that this step is a point of."""
        return {
            "loss": self.loss,
            "task_loss": self.task_loss,
            "distill_loss": self.distill_loss,
            "alpha": self.alpha,
            "lr": self.lr,
            **self.report,
            "samples_per_s": self.samples_per_s,
            "data_wait_s": self.data_wait_s,
            "world_size": self.world_size,
            **self._in_tokens(),
        }

    def _in_tokens(self) -> dict[str, float | None]:
        if not self.sample_tokens:
            return {}
        return {"tokens": self.samples * self.sample_tokens, "tokens_per_s": self.rate[0]}


@dataclass(frozen=True, slots=True)
class Span(Timed):
    """Something that took time; a bar of trace.json."""

    name: str
    category: Category
    start: float
    end: float
    """The end, in seconds since 1970."""
    stage: int | None = None
    """None: it belongs to no particular stage."""


@dataclass(frozen=True, slots=True)
class Evaluated(Timed):
    """A stage's model was measured on held-out data."""

    stage: int
    step: int
    """Optimiser steps done when the model was as it was measured."""
    metrics: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Measured(Timed):
    """A finished stage has metrics that its record did not have; `record` is its entry in run.json."""

    stage: int
    record: StageEntry


@dataclass(frozen=True, slots=True)
class StageEnded(Timed):
    """A stage is finished; `record` is its entry in run.json."""

    stage: int
    record: StageEntry


@dataclass(frozen=True, slots=True)
class Shared(Timed):
    """The store has a finished stage, if there is a store and it could be copied; told again once the store has its
    metrics.
    """

    stage: int
    record: StageEntry


@dataclass(frozen=True, slots=True)
class TrunkShared(Timed):
    """A state before a cool-down is shared with stages of other lengths."""

    stage: int
    trunk: str
    """The trunk's key."""
    step: int


@dataclass(frozen=True, slots=True)
class BadSamples(Timed):
    """A shard of the training data that was read lacks samples; told again by every rank, stage and epoch."""

    shard: str
    """The shard's address."""
    identity: str
    bad: Tally


@dataclass(frozen=True, slots=True)
class WorkerStarted(Timed):
    """A worker has started."""

    rank: int
    node: str
    """Ray's id of the node."""
    pid: int


@dataclass(frozen=True, slots=True)
class Saved(Timed):
    """A checkpoint is complete: what comes after `step` is all that could be lost."""

    stage: int
    step: int


@dataclass(frozen=True, slots=True)
class Stopped(Timed):
    """The workers have saved because they were asked to stop."""

    stage: int
    step: int


@dataclass(frozen=True, slots=True)
class Failed(Timed):
    """A worker met an error that would only come again."""

    message: str
    diverged: tuple[int, int] | None = None
    """Where training diverged: the stage, and the step of its last good state (0: there is none)."""


@dataclass(frozen=True, slots=True)
class OutOfMemory(Timed):
    """A worker ran out of memory, perhaps for too large a batch."""

    message: str
    stage: int
    micro_batch: int
    """Samples whose activations were held."""


@dataclass(frozen=True, slots=True)
class Restarted(Timed):
    """A worker group ended early, or was asked to, and another goes on from the last checkpoint."""

    reason: Reason
    workers: int
    """Workers of the group that ended."""
    message: str


@dataclass(frozen=True, slots=True)
class Warned(Timed):
    """Something the user should know that does not stop the run."""

    message: str


Event = (
    StageStarted | Step | Span | Evaluated | Measured | StageEnded | Shared | TrunkShared | BadSamples | WorkerStarted
    | Saved | Stopped | Failed | OutOfMemory | Restarted | Warned
)  # fmt: skip


class Listener:
    """Hears of a run's events: one method a kind, none of which does anything here."""

    def dispatch(self, event: Event) -> None:
        """Hands an event to the method of its kind."""
        match event:
            case Step():
                self.step(event)
            case Span():
                self.span(event)
            case Saved():
                self.saved(event)
            case BadSamples():
                self.bad_samples(event)
            case StageStarted():
                self.stage_started(event)
            case Evaluated():
                self.evaluated(event)
            case Measured():
                self.measured(event)
            case StageEnded():
                self.stage_ended(event)
            case Shared():
                self.shared(event)
            case TrunkShared():
                self.trunk_shared(event)
            case WorkerStarted():
                self.worker_started(event)
            case Stopped():
                self.stopped(event)
            case Failed():
                self.failed(event)
            case OutOfMemory():
                self.out_of_memory(event)
            case Restarted():
                self.restarted(event)
            case Warned():
                self.warned(event)
            case _:
                assert_never(event)

    def stage_started(self, event: StageStarted) -> None:
        """See StageStarted."""

    def step(self, event: Step) -> None:
        """See Step."""

    def span(self, event: Span) -> None:
        """See Span."""

    def evaluated(self, event: Evaluated) -> None:
        """See Evaluated."""

    def measured(self, event: Measured) -> None:
        """See Measured."""

    def stage_ended(self, event: StageEnded) -> None:
        """See StageEnded."""

    def shared(self, event: Shared) -> None:
        """See Shared."""

    def trunk_shared(self, event: TrunkShared) -> None:
        """See TrunkShared."""

    def bad_samples(self, event: BadSamples) -> None:
        """See BadSamples."""

    def worker_started(self, event: WorkerStarted) -> None:
        """See WorkerStarted."""

    def saved(self, event: Saved) -> None:
        """See Saved."""

    def stopped(self, event: Stopped) -> None:
        """See Stopped."""

    def failed(self, event: Failed) -> None:
        """See Failed."""

    def out_of_memory(self, event: OutOfMemory) -> None:
        """See OutOfMemory."""

    def restarted(self, event: Restarted) -> None:
        """See Restarted."""

    def warned(self, event: Warned) -> None:
        """See Warned."""


class Listeners(Listener):
    """Several listeners as one; they hear of an event in their order."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = tuple(listeners)

    def dispatch(self, event: Event) -> None:
        """Hands an event to all of them."""
        for listener in self._listeners:
            listener.dispatch(event)
