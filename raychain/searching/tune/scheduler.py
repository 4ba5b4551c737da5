"""The chains that are stopped early: any scheduler of Tune's, with what shared stages change.

Trials that are no chosen chains are never stopped. A measurement of a stage that trials share has one verdict, for all
of them. Tune does not save schedulers (ray#30838); what this one was told is saved with the callback, and told again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from typing import Any

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, HyperBandScheduler, TrialScheduler

from raychain.config.search import Part, named
from raychain.core.json import Json
from raychain.evaluators.metrics import Definition
from raychain.records import HalvingRecord
from raychain.searching.judging import LIMIT, Passed, Point, Rungs
from raychain.searching.reports import Report
from raychain.searching.trials import CHOSEN
from raychain.searching.trials import Trial as ChainTrial
from raychain.searching.tune.live import Live
from raychain.searching.tune.named import SCHEDULERS, make

CONTINUE = str(TrialScheduler.CONTINUE)
TIME = "percent"
"""What schedulers take for time: training MACs from the chain's first step on, in percent of the baseline's."""
NOBODY: Any = None
"""ASHA asks Tune's controller for nothing."""
STILL_S = 2.0
"""How long all trials wait before they go on: a searcher that has another one gives it sooner."""
NOT_KEPT = ("config", "trial_id", "hostname", "node_ip", "pid", "date", "timestamp", "experiment_tag", "done")
"""What Tune adds to a report that a scheduler has no use for or is given anew."""


class ChainScheduler(Live, TrialScheduler):
    """Asks `inner`, of which `metric` is the metric."""

    def __init__(self, inner: TrialScheduler, metric: str) -> None:
        super().__init__()
        self.inner, self._metric = inner, metric
        self._decided: dict[tuple[str, int], str] = {}
        """By stage and step, unless the scheduler lets trials wait for one another."""
        self._told: dict[str, list[Json]] = {}
        self._over: set[str] = set()
        self._given_up: set[str] = set()
        """Trials that `inner` has stopped."""
        self._released: set[str] = set()
        """Trials that it lets wait and that go on all the same."""
        self._still_since = math.inf
        self._stopped: set[int] = set()
        self._learns = type(inner) is not FIFOScheduler and not isinstance(inner, HyperBandScheduler)
        self._again = False

    @property
    def metric(self) -> str:
        """What reports have to have."""
        return str(self._metric)

    @property
    def supports_buffered_results(self) -> bool:
        """Each result is judged at once."""
        return False

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """The scheduler inside may have a metric and mode of its own, which Tune does not allow."""
        if getattr(self.inner, "_metric", None) is None:
            self.inner.set_search_properties(metric, mode, **spec)
        return True

    def state(self) -> Json:
        """What is saved."""
        return {
            "decided": dict(self._decided),
            "told": {t: list(r) for t, r in self._told.items()},
            "over": set(self._over),
        }

    def restore_state(self, state: Json) -> None:
        """Goes on from there: every trial that is added again brings what it had reported."""
        self._decided, self._told, self._over = dict(state["decided"]), dict(state["told"]), set(state["over"])
        self._again = self._learns  # hyperband would wait for trials that are over

    def why(self, trial: ChainTrial, metric: Definition) -> str:  # noqa: ARG002 - halving says what of
        """Why a chain was stopped."""
        return f"stopped by {type(self.inner).__name__}" if trial.number in self._stopped else "the search was stopped"

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """A trial is there, or there again."""
        if not chosen(trial):
            return
        self.inner.on_trial_add(tune_controller, trial)
        same = {"trial_id": trial.trial_id, "config": trial.config}
        results = [result | same for result in self._told.get(trial.trial_id, [])] if self._again else []
        for result in results:
            self._judged(tune_controller, trial, result)
        if results and trial.trial_id in self._over:
            self.inner.on_trial_complete(tune_controller, trial, results[-1])

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: Report) -> str:
        """Whether a trial goes on after a measurement."""
        if not chosen(trial):
            return CONTINUE
        if self._learns:
            kept = {name: value for name, value in result.items() if name not in NOT_KEPT}
            self._told.setdefault(trial.trial_id, []).append(kept)
        decision = self._judged(tune_controller, trial, result)
        if result["complete"] and decision == TrialScheduler.PAUSE:
            return CONTINUE  # there is nothing left to wait for
        if self._learns and decision != TrialScheduler.PAUSE:
            decision = self._decided.setdefault((result["key"], result["step"]), decision)
        if decision == TrialScheduler.STOP:
            self._stopped.add(trial.config["number"])
        return decision

    def _judged(self, tune_controller: TuneController, trial: Trial, result: Report) -> str:
        """What `inner` says. It hears no more of a trial that it has stopped and that goes on all the same, as an
        earlier verdict on a shared stage, or of an earlier call, was another: Tune's median rule would fail.
        """
        if trial.trial_id in self._given_up:
            return CONTINUE
        decision: str = self.inner.on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self._given_up.add(trial.trial_id)
        return decision

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: Report) -> None:
        """A trial is over."""
        if chosen(trial):
            self._over.add(trial.trial_id)
            self.inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """A trial is over before its time."""
        if chosen(trial):
            self.inner.on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        """A trial has failed."""
        if chosen(trial):
            self.inner.on_trial_error(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        """What starts next: controls, then what the scheduler wants."""
        for trial in tune_controller.get_trials():
            if trial.status == Trial.PENDING and not chosen(trial):
                return trial
        found: Trial | None = self.inner.choose_trial_to_run(tune_controller)
        return found or self._left_waiting(tune_controller.get_live_trials())

    def _left_waiting(self, alive: Collection[Trial]) -> Trial | None:
        """A trial that waits although nothing else goes on: Tune's hyperband waits for as many as its brackets hold,
        which a search may not have, and forgets those that others have left behind.
        """
        paused = {trial.trial_id: trial for trial in alive if trial.status == Trial.PAUSED}
        if not paused or any(trial.status != Trial.PAUSED for trial in alive):
            self._still_since = math.inf
        elif time.monotonic() - self._still_since > STILL_S:
            self._released = set(paused)
        else:
            self._still_since = min(self._still_since, time.monotonic())
        self._released &= set(paused)
        return paused[self._released.pop()] if self._released else None

    def debug_string(self) -> str:
        """What Tune shows of it."""
        return str(self.inner.debug_string())


class HalvingScheduler(ChainScheduler):
    """Tune's ASHA at rungs of equal MACs: it hears of a chain's value at each rung, and each shared stage once."""

    def __init__(self, rungs: Rungs, metric: str) -> None:
        mode = "max" if rungs.best == "high" else "min"
        limits: Any = {"max_t": LIMIT, "grace_period": rungs.grace}  # declared as whole numbers, which they need not be
        asha = AsyncHyperBandScheduler(time_attr=TIME, metric=metric, mode=mode, reduction_factor=rungs.factor,
                                       stop_last_trials=False, **limits)  # fmt: skip
        super().__init__(asha, metric)
        self.rungs = rungs
        self._before: dict[int, Point] = {}
        """The newest measurement of every trial."""

    def state(self) -> Json:
        """What is saved."""
        return {"decided": dict(self._decided), "before": dict(self._before), "rungs": self.rungs.state().content()}

    def restore_state(self, state: Json) -> None:
        """Goes on from there."""
        self._decided, self._before = dict(state["decided"]), dict(state["before"])
        self.restore_rungs(HalvingRecord.of(state["rungs"]))

    def restore_rungs(self, state: HalvingRecord) -> None:
        """Tells Tune's scheduler again what passed its rungs."""
        self.rungs.restore(state)
        for entry in state.passed:
            for key, value in entry.values.items():
                past: Any = _Past(f"past {key}")
                self.inner.on_trial_add(NOBODY, past)
                at = self.rungs.grace * self.rungs.factor**entry.rung
                self.inner.on_trial_result(NOBODY, past, {TIME: at, self.metric: value})

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: Report) -> str:
        """Whether a trial goes on after a measurement."""
        if not chosen(trial):
            return CONTINUE
        number, now = trial.config["number"], Point(result[TIME], result[self.metric])
        before, self._before[number] = self._before.get(number), now
        place = (result["key"], result["step"])
        if place not in self._decided:
            self._decided[place] = CONTINUE
            for found in self.rungs.between(before, now):
                if self._decided[place] == CONTINUE and result["key"] not in self.rungs.passed.get(found.rung, {}):
                    self._decided[place] = self._judge(tune_controller, trial, result, found)
        return CONTINUE if result["complete"] else self._decided[place]

    def why(self, trial: ChainTrial, metric: Definition) -> str:
        """Why a chain was stopped."""
        verdict = self.rungs.ended(trial.keys)
        return self.rungs.words(verdict, metric) if verdict else super().why(trial, metric)

    def _judge(self, tune_controller: TuneController, trial: Trial, result: Report, found: Passed) -> str:
        there = result | {TIME: found.percent, self.metric: found.value}
        decision: str = self.inner.on_trial_result(tune_controller, trial, there)
        stopped = decision == TrialScheduler.STOP and not result["complete"]
        self.rungs.note(result["key"], found, stopped=stopped)
        return decision

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: Report) -> None:  # noqa: ARG002
        """Everything of it was heard at its rungs."""
        if chosen(trial):
            self.inner.on_trial_remove(tune_controller, trial)


class _Past:
    """The part of a trial that ASHA looks at."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def chosen(trial: Trial) -> bool:
    """Whether it is a chain that may be stopped, no control."""
    return trial.config.get("kind") in CHOSEN


def make_scheduler(part: Part | None, rungs: Rungs | None, metric: str, mode: str) -> ChainScheduler:
    """The scheduler of a search. Raises InputError."""
    if rungs:
        return HalvingScheduler(rungs, metric)
    if part is None:
        return ChainScheduler(FIFOScheduler(), metric)
    # a scheduler that lets trials wait so that others may run has no reason to: they hold nothing that stages need
    usual = {"metric": metric, "mode": mode, "time_attr": TIME, "min_time_slice": math.inf}
    return ChainScheduler(make(SCHEDULERS, named(part), {"asha": ""}, **usual), metric)
