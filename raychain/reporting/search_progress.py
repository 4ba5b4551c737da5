"""What the user sees while a search goes: plain lines on stderr, as several chains train at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from raychain.core.wording import clock, macs, number, several
from raychain.errors import one_line
from raychain.evaluators.metrics import Definition
from raychain.events import Event, Listener, Measured, Restarted, StageEnded, Step, Warned
from raychain.records import ChainedRecord, Metrics
from raychain.terminal import say

STEP_EVERY_S = 60.0


class ShownTrial(Protocol):
    """What is shown of a trial (searching.campaign.Trial)."""

    number: int
    kind: Any
    status: Any
    reason: str | None
    metrics: Metrics

    @property
    def macs(self) -> int:
        """Training MACs."""

    @property
    def chain(self) -> list[ChainedRecord]:
        """Models and epochs."""


class ShownJob(Protocol):
    """What is shown of a worker group's work (searching.campaign.Job)."""

    @property
    def trial(self) -> ShownTrial:
        """The trial whose chain it trains."""

    @property
    def stages(self) -> int:
        """How many stages it ends."""


class SearchProgress:
    """Prints a line for every stage that ends and every trial that is over, a slow one for long stages."""

    def __init__(self, trials: int, metric: Definition) -> None:
        self.trials, self.metric = trials, metric
        self.quiet = False
        """While an earlier call's trials are taken up."""
        self._over: set[int] = set()
        self._lock, self._shown = threading.Lock(), {}  # type: tuple[threading.Lock, dict[tuple[int, int], float]]
        self._warned: set[str] = set()

    def say(self, text: str) -> None:
        """One line."""
        with self._lock:
            say(one_line(text))

    def opening(self, slots: int, size: int) -> None:
        """What will be done."""
        groups = f"{slots} worker groups" if slots > 1 else "one worker group"
        self.say(f"search: {min(self.trials, size)} of {size:,} possible chains, {groups} at once")

    def continued(self, over: int, left: int) -> None:
        """What an earlier call has done."""
        self.say(f"search: continued: {over} trials are over, {left} go on")

    def begin(self, job: ShownJob) -> None:
        """A worker group begins."""
        stages = job.stages
        left = "" if stages == len(job.trial.chain) else f", the last {stages} of {len(job.trial.chain)} stages"
        self.say(f"{_title(job.trial)}: {describe(job.trial.chain)}{left}")

    def of(self, job: ShownJob) -> Listener:
        """Hears of what happens in a worker group."""
        return _OfJob(self, job.trial)

    def ended(self, trial: ShownTrial, trials: Sequence[ShownTrial]) -> None:
        """A trial is over."""
        if self.quiet:
            return
        own = [t for t in trials if t.kind in ("planned", "sampled")]
        over = sum(t.status != "running" for t in own)
        count = f" [{over}/{self.trials}]" if trial.kind in ("planned", "sampled") else ""
        if trial.status in ("failed", "stopped"):
            self.say(f"{_title(trial)}{count}: {trial.status}: {trial.reason}")
            return
        values = [value for t in own if (value := self.metric.value(t.metrics)) is not None]
        best = max(values, key=self.metric.rank, default=None)
        ahead = f" · best chain so far {self.metric.written(best)}" if best is not None else ""
        measured = f"{self.metric.label} {self.metric.written(self.metric.value(trial.metrics))}"
        self.say(f"{_title(trial)}{count}: {describe(trial.chain)} · {macs(trial.macs)} MACs · {measured}{ahead}")

    def due(self, trial: ShownTrial, stage: int) -> bool:
        """Whether a line on a stage that trains is due, as the last one was some time ago."""
        place, now = (trial.number, stage), time.monotonic()
        if now - self._shown.setdefault(place, now) < STEP_EVERY_S:
            return False
        self._shown[place] = now
        return True

    def is_new(self, warning: str) -> bool:
        """Whether no chain has warned of this before."""
        known = warning in self._warned
        self._warned.add(warning)
        return not known


class _OfJob(Listener):
    """Prints what happens in one worker group."""

    def __init__(self, progress: SearchProgress, trial: ShownTrial) -> None:
        self._progress, self._metric, self._trial = progress, progress.metric, trial

    def dispatch(self, event: Event) -> None:
        with suppress(Exception):  # a display is no reason to lose a search
            super().dispatch(event)

    def step(self, event: Step) -> None:
        if self._progress.due(self._trial, event.stage):
            model, rate = self._trial.chain[event.stage].model, "{:,.4g} {}".format(*event.rate)
            self._say(f"{model} epoch {event.epoch:.1f} · loss {number(event.loss)} · {rate}")

    def stage_ended(self, event: StageEnded) -> None:
        record, value = event.record, self._metric.value(event.record.metrics or {})
        measured = f" · {self._metric.label} {self._metric.written(value)}" if value is not None else ""
        took = f" in {clock(record.wall_s)}"
        self._say(f"{record.model} {several(record.epochs or 0.0, 'epoch', '.4g')} {record.status}{took}{measured}")

    def measured(self, event: Measured) -> None:
        record, value = event.record, self._metric.value(event.record.metrics or {})
        if value is not None:
            measured = f"{self._metric.label} {self._metric.written(value)}"
            self._say(f"{record.model} {several(record.epochs or 0.0, 'epoch', '.4g')}: {measured}")

    def restarted(self, event: Restarted) -> None:
        self._say(event.message)

    def warned(self, event: Warned) -> None:
        if self._progress.is_new(event.message):
            self._say(f"warning: {event.message}")

    def _say(self, text: str) -> None:
        self._progress.say(f"{_title(self._trial)}: {text}")


def describe(chain: Sequence[ChainedRecord]) -> str:
    """`CoM-micro-S 8 → CoM-micro-M 3`."""
    return " → ".join(f"{stage.model} {stage.epochs:.4g}" for stage in chain)


def _title(trial: ShownTrial) -> str:
    names = {"control": " (alone)", "equal-macs": " (alone, equal MACs)", "full": " (in full)"}
    return f"trial {trial.number}{names.get(trial.kind, '')}"
