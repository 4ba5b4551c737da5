"""The loop of a search: gives worker groups stages to train while there are trials, and ends trials. Knows no Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from raychain.core.json import Json
from raychain.records import ChainedRecord, Metrics, StageEntry
from raychain.searching.tree import StageTree
from raychain.training.task import ChainTask, StageTask

Kind = Literal["planned", "sampled", "control", "equal-macs", "full"]


class Step(NamedTuple):
    """A node of the tree of stages."""

    key: str
    place: int
    """Index of the stage within its chain."""
    share: float
    """Share of the stage's steps that end here."""
    stage: StageTask

    @property
    def whole(self) -> bool:
        """It ends the stage."""
        return self.key == self.stage.key


def trunk_key(trunk: str, rung: int) -> str:
    """The key of a trunk's first `rung` steps."""
    return f"{trunk}@{rung}"


@dataclass
class Trial:
    """One chain that is tried."""

    number: int
    kind: Kind
    params: Json
    """The sampler's choices; for other kinds, what tells it from the others."""
    task: ChainTask
    status: Literal["running", "succeeded", "failed", "stopped"] = "running"
    reason: str | None = None
    """Why it failed or was stopped before its end."""
    metrics: Metrics = field(default_factory=dict)
    reached: int | None = None
    """How many nodes of its path were there when it was stopped."""

    @property
    def keys(self) -> list[str]:
        """Its stages."""
        return [stage.key for stage in self.task.stages]

    @property
    def path(self) -> list[Step]:
        """Its nodes in the tree of stages: the stages, each after the parts of its trunk."""
        found = []
        for place, stage in enumerate(self.task.stages):
            before = 0
            for rung in stage.rungs:
                found.append(Step(trunk_key(stage.trunk, rung), place, (rung - before) / stage.steps, stage))
                before = rung
            found.append(Step(stage.key, place, 1 - before / stage.steps, stage))
        return found

    @property
    def macs(self) -> int:
        """Training MACs of the whole chain, whoever trains its stages."""
        return sum(stage.macs for stage in self.task.stages)

    @property
    def chain(self) -> list[ChainedRecord]:
        """Models and epochs."""
        return [ChainedRecord(model=stage.model, epochs=stage.epochs) for stage in self.task.stages]


@dataclass(eq=False)
class Job:
    """A path of the tree for one worker group, and the trial whose chain it is."""

    trial: Trial
    keys: list[str]

    @property
    def stages(self) -> int:
        """How many stages it ends."""
        return len(set(self.keys) & set(self.trial.keys))


class StageDone(NamedTuple):
    """A job finished a stage or a part of a trunk, and others can use it."""

    job: Job
    key: str
    record: StageEntry


class Measured(NamedTuple):
    """A job's stage was measured after so many of its steps."""

    job: Job
    place: int
    step: int
    metrics: Metrics


class JobEnded(NamedTuple):
    """A job is over: an error (None: without), or it was stopped."""

    job: Job
    error: str | None = None
    stopped: bool = False


Notice = StageDone | Measured | JobEnded


class Runner(Protocol):
    """What trains: on Ray (searching.running), or simulated."""

    def start(self, job: Job) -> None:
        """Begins; returns at once."""

    def wait(self) -> Notice:
        """The next thing that happened."""

    def cut(self, job: Job) -> None:
        """Has the job save and end, stopped; returns at once."""


class Campaign:
    """Keeps `slots` worker groups busy.

    `source` gives the next trial, or None while it has none; it is asked only when a worker group is free and no stage
    ready, so that the sampler knows as many results as possible. `finished` hears of every stage that is there,
    `measured` of every measurement, `ended` of every trial; `idle` is called before every wait. The first two may
    `drop` trials.
    """

    def __init__(
        self,
        runner: Runner,
        slots: int,
        *,
        known: Callable[[Step], StageEntry | None],
        begun: Callable[[Job], None] = lambda _: None,
        finished: Callable[[str, StageEntry, Job | None], None] = lambda *_: None,
        measured: Callable[[Measured], None] = lambda _: None,
        ended: Callable[[Trial], None] = lambda _: None,
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        self.runner, self.slots = runner, slots
        self.known, self.begun, self.idle = known, begun, idle
        self.finished, self.measured, self.ended = finished, measured, ended
        self.tree = StageTree()
        self.trials: dict[int, Trial] = {}
        self.records: dict[str, StageEntry] = {}
        self.running: list[Job] = []
        self.cut: list[Job] = []
        """Jobs that were stopped."""
        self.stopping = False
        self._prepared: list[Job] = []

    def add(self, trial: Trial) -> None:
        """A trial whose stages are to be trained, as far as they are not known."""
        self.trials[trial.number] = trial
        path = trial.path
        fresh = {step.key for step in path if step.key not in self.tree.nodes}
        state = self.tree.add(trial.number, [(step.key, step.share * step.stage.macs) for step in path])
        if state != "waiting":
            self._end(trial.number, state == "done", "a stage that it shares failed")
            return
        for place in range(len(trial.task.stages)):
            *parts, whole = (step for step in path if step.place == place)
            if whole.key in fresh and (record := self.known(whole)) is not None:
                self._done(whole.key, record, None)
            for part in parts:
                if self.tree.nodes[part.key].state == "waiting" and (record := self.known(part)) is not None:
                    self._done(part.key, record, None)
            if self.tree.nodes[whole.key].state != "done" or trial.status != "running":
                break

    def resume(self, trial: Trial) -> None:
        """Adds a trial, as `add` does; what is left of it is trained first, by one worker group, as it was before an
        interruption.
        """
        self.add(trial)
        if trial.status == "running" and (keys := self.tree.take_trial([step.key for step in trial.path])):
            self._prepared.append(Job(trial, keys))

    def run(self, source: Callable[[], Trial | None]) -> bool:
        """Until `source` has no more trials and all are over (True), or `stopping` (False)."""
        while True:
            while not self.stopping and len(self.running) < self.slots and (job := self._next(source)):
                self.running.append(job)
                self.begun(job)
                self.runner.start(job)
            if not self.running:
                return not self.stopping
            self.idle()
            self._handle(self.runner.wait())

    def drop(self, trials: Sequence[Trial], reason: str) -> None:
        """Stops these trials before their end; work that nobody else needs is cut."""
        for trial in trials:
            self.tree.drop(trial.number)
            trial.status, trial.reason = "stopped", reason
            trial.reached = sum(self.tree.nodes[step.key].state == "done" for step in trial.path)
            self.ended(trial)
        for job in self.running:
            self._cut_if_idle(job)

    def waiting(self) -> int:
        """Trials that are not over."""
        return sum(trial.status == "running" for trial in self.trials.values())

    def _next(self, source: Callable[[], Trial | None]) -> Job | None:
        if self._prepared:
            return self._prepared.pop(0)
        while not (keys := self.tree.take()):
            trial = source()
            if trial is None:
                return None
            self.add(trial)
        return Job(self.trials[self.tree.nodes[keys[-1]].ends[0]], keys)

    def _cut_if_idle(self, job: Job) -> None:
        left = [key for key in job.keys if self.tree.nodes[key].state == "taken"]
        if left and not any(map(self.tree.wanted, left)):
            self.runner.cut(job)

    def _handle(self, notice: Notice) -> None:
        job = notice.job
        if isinstance(notice, StageDone):
            self._done(notice.key, notice.record, job)
            self._cut_if_idle(job)
            return
        if isinstance(notice, Measured):
            self.measured(notice)
            return
        self.running.remove(job)
        left = [key for key in job.keys if self.tree.nodes[key].state == "taken"]
        if notice.stopped or not left:
            self.tree.release(left)
            self.cut += [job] if notice.stopped and job.trial.status == "running" else []
            return
        for number in self.tree.failed(left[0]):
            self._end(number, False, notice.error or "its worker group ended without a result")

    def _done(self, key: str, record: StageEntry, job: Job | None) -> None:
        ended = self.tree.done(key)
        if key not in self.records:
            self.records[key] = record
            self.finished(key, record, job)
        for number in ended:
            self._end(number, True)

    def _end(self, number: int, succeeded: bool, reason: str | None = None) -> None:
        trial = self.trials[number]
        trial.status = "succeeded" if succeeded else "failed"
        trial.reason = None if succeeded else reason
        if succeeded:
            trial.metrics = dict(self.records[trial.keys[-1]].metrics or {})
        self.ended(trial)


def ratio(trials: Sequence[Trial], trained: set[str]) -> tuple[float, float]:
    """Epochs of all stages of all trials, and of what was trained for them: stages, and parts of trunks.

    Of trials that were stopped only what they reached counts.
    """
    steps = [step for trial in trials for step in trial.path[: trial.reached]]
    distinct = {step.key: step.share * step.stage.epochs for step in steps}
    return (
        round(sum(step.share * step.stage.epochs for step in steps), 4),
        round(sum(epochs for key, epochs in distinct.items() if key in trained), 4),
    )
