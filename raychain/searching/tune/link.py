"""What follows from what Tune does: which trials are wanted, which are over, when search.json is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.tune import Callback
from ray.tune.callback import CallbackList
from ray.tune.experiment import Trial as TuneTrial

from raychain.core.json import Json
from raychain.searching.book import Book, ForeignTrialError
from raychain.searching.trials import Trial
from raychain.searching.tune.desk import Desk
from raychain.searching.tune.live import DamagedStateError, Live
from raychain.searching.tune.scheduler import ChainScheduler, HalvingScheduler

ALIVE = (TuneTrial.PENDING, TuneTrial.RUNNING)
OVER = (TuneTrial.TERMINATED, TuneTrial.ERROR)


class Link(Live, CallbackList):
    """Looks at Tune's trials at every step, by their status: of a search that a stopper ends Tune tells nobody else.

    The other callbacks are inside, so that they are the present call's own when a search goes on.
    """

    def __init__(self, book: Book, desk: Desk, scheduler: ChainScheduler, callbacks: Sequence[Callback]):
        super().__init__(list(callbacks))
        self._book, self._desk, self._scheduler = book, desk, scheduler
        self.expected = 0
        """Trials that Tune must know, as it does in a search that goes on."""
        self._trials: dict[str, Trial] = {}
        self._wanted: set[str] = set()
        self._over: set[str] = set()

    def on_step_begin(self, **info: Any) -> None:  # type: ignore[override]
        """Before Tune asks for more trials."""
        self._look(info["trials"])
        super().on_step_begin(**info)

    def on_step_end(self, **info: Any) -> None:  # type: ignore[override]
        """After Tune has heard of a result."""
        self._look(info["trials"])
        if isinstance(self._scheduler, HalvingScheduler):
            self._book.asha = self._scheduler.rungs.state() if self._book.changed else self._book.asha
        self._book.save()
        super().on_step_end(**info)

    def _look(self, trials: Sequence[TuneTrial]) -> None:
        self._desk.check()
        if len(trials) < self.expected:  # it would begin anew, and only its log would tell
            raise DamagedStateError(f"{len(trials)} of {self.expected} trials")
        wanted, restored = [], self.expected and not self._trials
        for entry in trials:
            name = entry.trial_id
            if name in self._over:
                continue
            trial = self._trials.get(name) or self._admit(entry)
            if trial.number in self._desk.failed:
                entry.max_failures = 0
            if entry.status in ALIVE and name not in self._wanted:
                self._wanted.add(name)
                wanted.append(trial)
            elif entry.status not in ALIVE and name in self._wanted:
                self._wanted.remove(name)
                self._desk.unwant(trial, for_good=entry.status in OVER)
            if entry.status in OVER:
                self._over.add(name)
                self._end(entry, trial, quiet=bool(restored))
        if restored:
            self._book.progress.continued(len(self._over), len(wanted))
        if wanted:
            self._desk.want(wanted)

    def _admit(self, entry: TuneTrial) -> Trial:
        try:
            self._trials[entry.trial_id] = self._book.admit(entry.config)
        except ForeignTrialError as error:
            raise DamagedStateError(str(error)) from error
        return self._trials[entry.trial_id]

    def _end(self, entry: TuneTrial, trial: Trial, *, quiet: bool) -> None:
        result = entry.last_result or {}
        if entry.status == TuneTrial.ERROR:
            trial.status = "failed"
            trial.reason = self._desk.failed.get(trial.number) or self._book.reason(trial) or str(entry.get_error())
        elif result.get("complete"):
            definitions = self._book.plan.base.suite.definitions
            names = [name for d in definitions for name in (d.name, d.former)]
            trial.status, trial.reason = "succeeded", None  # an earlier call may have had one
            trial.metrics = {name: result[name] for name in names if name in result}
        else:
            trial.status = "stopped"
            trial.reason = trial.reason or self._scheduler.why(trial, self._book.plan.metric)
            if trial.reached is None and quiet:  # by an earlier call that could not write it down
                steps = [step for step in trial.path if step.place <= result.get("stage", -1)]
                trial.reached = len(steps) - (bool(steps) and not result.get("whole"))
        self._book.over(trial, quiet=quiet)

    def get_state(self) -> Json:
        """What Tune does not save itself: the scheduler's state; and that of the other callbacks."""
        return {"scheduler": self._scheduler.state(), "callbacks": super().get_state()}

    def set_state(self, state: Json) -> None:
        """Goes on from there."""
        self._scheduler.restore_state(state["scheduler"])
        if state["callbacks"]:
            super().set_state(state["callbacks"])
