"""The loop of a search: gives worker groups the stages that trials want, each once. Knows neither Ray nor Tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from raychain.records import StageEntry
from raychain.searching.reports import Measure, Report, Reporter
from raychain.searching.tree import StageTree
from raychain.searching.trials import Step, Trial


@dataclass(eq=False)
class Job:
    """A path of the tree for one worker group, and the trial whose chain it is."""

    trial: Trial
    keys: list[str]

    @property
    def stages(self) -> int:
        """How many stages it ends."""
        return len(set(self.keys) & set(self.trial.keys))


class Wanted(NamedTuple):
    """Trials whose stages are to be trained, as far as they are not there."""

    trials: Sequence[Trial]


class Unwanted(NamedTuple):
    """A trial is over, or waits for others; stages that nobody else needs are not trained any further."""

    trial: Trial


class Stop(NamedTuple):
    """Every worker group is to save and end."""


class Trained(NamedTuple):
    """A job has trained a stage, which has perhaps still to be measured."""

    job: Job
    key: str


class StageDone(NamedTuple):
    """A job finished a stage or a part of a trunk, and others can use it."""

    job: Job
    key: str
    record: StageEntry


class Measured(NamedTuple):
    """A job's stage was measured after so many of its steps."""

    job: Job
    place: int
    measure: Measure


class JobEnded(NamedTuple):
    """A job is over: an error (None: without), or it was stopped."""

    job: Job
    error: str | None = None
    stopped: bool = False


Notice = Wanted | Unwanted | Stop | Trained | StageDone | Measured | JobEnded


class Runner(Protocol):
    """What trains: on Ray (searching.running), or simulated."""

    def start(self, job: Job) -> None:
        """Begins; returns at once."""

    def wait(self) -> Notice:
        """The next thing that happened, or that somebody has `put`."""

    def put(self, notice: Notice) -> None:
        """Has `wait` return this; from any thread."""

    def cut(self, job: Job) -> None:
        """Has the job save and end, stopped; returns at once."""


class Audience(Protocol):
    """Who wants trials, and hears how far they are. Called from the campaign's thread."""

    def tell(self, trial: Trial, first: int, reports: Sequence[Report], end: str | None) -> None:
        """What a trial reports, from which number on; `end` where nothing follows: how the trial ended."""

    def hungry(self, yes: bool, heard: int) -> None:
        """Whether a worker group is free and no stage ready, once so many `Wanted` have been heard."""


class Campaign:
    """Keeps `slots` worker groups busy with what trials want.

    `known` gives the record of a stage, or of a part of a trunk, that the storage has. `begun` are the chains of an
    earlier call's jobs by their trial's number: what is left of them is trained first, by one worker group, as it was.
    """

    def __init__(
        self,
        runner: Runner,
        slots: int,
        *,
        known: Callable[[Step], StageEntry | None],
        reporter: Reporter,
        audience: Audience,
        begun: Mapping[int, Sequence[str]] | None = None,
        trained: Sequence[str] = (),
    ) -> None:
        self.runner, self.slots, self.known = runner, slots, known
        self.reporter, self.audience = reporter, audience
        self.tree = StageTree()
        self.trials: dict[int, Trial] = {}
        """Those that are wanted."""
        self.records: dict[str, StageEntry] = {}
        self.curves: dict[str, list[Measure]] = {}
        self.errors: dict[str, str] = {}
        self.running: list[Job] = []
        self.cut: list[Job] = []
        """Jobs that were stopped while their trial was wanted."""
        self.trained = set(trained)
        """Stages, and parts of trunks, that this search has trained, now or in an earlier call."""
        self.stopping = False
        self._begun = dict(begun or {})
        self._before = {key for keys in self._begun.values() for key in keys}
        self._prepared: list[Job] = []
        self._heard = 0

    def run(self) -> None:
        """Until a `Stop`, and all jobs are over."""
        while self.running or not self.stopping:
            while not self.stopping and len(self.running) < self.slots and (job := self._next()):
                self.running.append(job)
                self.runner.start(job)
            self.audience.hungry(not self.stopping and len(self.running) < self.slots, self._heard)
            self._handle(self.runner.wait())

    def _next(self) -> Job | None:
        while self._prepared:
            job = self._prepared.pop(0)
            if any(map(self.tree.wanted, job.keys)):
                return job
            self.tree.release(job.keys)
        keys = self.tree.take()
        return Job(self.trials[self.tree.nodes[keys[-1]].ends[0]], keys) if keys else None

    def _handle(self, notice: Notice) -> None:
        match notice:
            case Wanted(trials):
                self._heard += 1
                self._want(trials)
            case Unwanted(trial):
                self._unwant(trial)
            case Stop():
                self.stopping = True
                for job in self.running:
                    self.runner.cut(job)
            case Trained(job, key):
                self.trained.add(key)
                job.trial.own.add(key)
            case StageDone(job, key, record):
                if record.status == "trained":
                    self._handle(Trained(job, key))
                self._done(key, record)
                self._cut_if_idle(job)
            case Measured(job, place, measure):
                key = job.trial.task.stages[place].key
                curve = self.curves.setdefault(key, [])
                if key not in self.records and (not curve or curve[-1].step < measure.step):
                    curve.append(measure)
                    self._post(key)
            case JobEnded(job, error, stopped):
                self._ended(job, error, stopped=stopped)

    def _want(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            self.trials[trial.number] = trial
            trial.told = 0
            self._add(trial)
        for trial in trials:
            if trial.number in self._begun:
                del self._begun[trial.number]
                if keys := self.tree.take_trial([step.key for step in trial.path]):
                    self._prepared.append(Job(trial, keys))
        for trial in trials:
            self._tell(trial)

    def _add(self, trial: Trial) -> None:
        path = trial.path
        fresh = {step.key for step in path if step.key not in self.tree.nodes}
        self.tree.add(trial.number, [(step.key, step.share * step.stage.macs) for step in path])
        for place in range(len(trial.task.stages)):
            *parts, whole = (step for step in path if step.place == place)
            for step in (whole, *parts):
                waits = step.key in fresh and self.tree.nodes[step.key].state == "waiting"
                if waits and (record := self.known(step)) is not None:
                    if step.key in self._before:
                        self.trained.add(step.key)
                    self._done(step.key, record)
            if self.tree.nodes[whole.key].state != "done":
                break

    def _unwant(self, trial: Trial) -> None:
        if self.trials.pop(trial.number, None) is None:
            return
        trial.reached = sum(self.tree.nodes[step.key].state == "done" for step in trial.path)
        self.tree.drop(trial.number)
        for job in self.running:
            self._cut_if_idle(job)

    def _cut_if_idle(self, job: Job) -> None:
        left = [key for key in job.keys if self.tree.nodes[key].state == "taken"]
        if left and not any(map(self.tree.wanted, left)):
            self.runner.cut(job)

    def _done(self, key: str, record: StageEntry) -> None:
        self.tree.done(key)
        if key not in self.records:
            self.records[key] = record
            self._post(key)

    def _ended(self, job: Job, error: str | None, *, stopped: bool) -> None:
        self.running.remove(job)
        left = [key for key in job.keys if self.tree.nodes[key].state == "taken"]
        if stopped or not left:
            self.tree.release(left)
            self.cut += [job] if stopped and job.trial.number in self.trials else []
            return
        self.errors[left[0]] = error or "its worker group ended without a result"
        self.tree.failed(left[0])
        self._post(left[0])

    def _post(self, key: str) -> None:
        for trial in list(self.trials.values()):
            if key in trial.keys or key in self.errors:
                self._tell(trial)

    def _tell(self, trial: Trial) -> None:
        found, end = self.reporter.of(trial, self.records, self.curves, self.errors)
        first, trial.told = trial.told, len(found)
        if found[first:] or end:
            self.audience.tell(trial, first, found[first:], end)


def ratio(trials: Sequence[Trial], trained: set[str]) -> tuple[float, float]:
    """Epochs of all stages of all trials, and of what was trained for them: stages, and parts of trunks.

    Of trials that were stopped only what they reached counts.
    """
    steps = [step for trial in trials for step in trial.path[: trial.reached if trial.status == "stopped" else None]]
    distinct = {step.key: step.share * step.stage.epochs for step in steps}
    return (
        round(sum(step.share * step.stage.epochs for step in steps), 4),
        round(sum(epochs for key, epochs in distinct.items() if key in trained), 4),
    )
