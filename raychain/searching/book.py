"""The trials of a search, as Tune has them, and search.json, which is made of them. Nothing of Tune or Ray."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping

from raychain import records
from raychain.evaluators.metrics import written_down
from raychain.records import BaselineRecord, HalvingRecord, SearchRecord, TrialRecord
from raychain.reporting.search_progress import SearchProgress
from raychain.searching.campaign import Campaign, ratio
from raychain.searching.continuing import RESULT, identity
from raychain.searching.controls import baseline_choices
from raychain.searching.outcome import best_chain, comparisons, pareto, score
from raychain.searching.request import Plan
from raychain.searching.result import proxy_record, trial_record
from raychain.searching.space import Params
from raychain.searching.tasks import Tasks
from raychain.searching.trials import Kind, Trial

WRITTEN_S = 1.0
"""How often search.json is written at most, while there is something new."""
SHARE = 20
"""At most one part in so many of the time is spent on that."""


class ForeignTrialError(Exception):
    """What a folder says of a trial makes no trial of this search."""


class Book:
    """What is known of every trial. Used by Tune's thread alone."""

    def __init__(self, plan: Plan, tasks: Tasks, before: SearchRecord | None, progress: SearchProgress,
                 versions: Mapping[str, str]) -> None:  # fmt: skip
        self.plan, self.tasks, self.before, self.progress = plan, tasks, before, progress
        self.trials: dict[int, Trial] = {}
        self.proposals: deque[tuple[Kind, Params]] = deque()
        """What no searcher suggests: controls, and what follows the chains that were chosen."""
        self.seen: dict[str, Trial] = {}
        """The first chosen trial by its chain's name."""
        self.campaign: Campaign
        self.asha: HalvingRecord | None = None
        self._identity, self._versions = identity(plan), dict(versions)
        self._earlier = {entry.number: entry for entry in (before and before.trials) or ()}
        self._drafts: dict[int, Trial] = {}
        self._entries: dict[int, TrialRecord] = {}
        self._due, self.changed = 0.0, False

    @property
    def given(self) -> int:
        """Chosen trials so far."""
        return sum(trial.chosen for trial in self.trials.values())

    @property
    def open(self) -> int:
        """Trials that are not over."""
        return sum(trial.status == "running" for trial in self.trials.values())

    def draft(self, kind: Kind, params: Params) -> Trial | None:
        """A trial that Tune may take up; None where such a chain cannot be trained."""
        task = self.tasks.possible(kind, params)
        if task is None:
            return None
        same = (n for n, e in self._earlier.items() if (e.kind, e.params) == (kind, params) and n not in self.trials)
        number = next(same, max((*self.trials, *self._earlier), default=-1) + 1)
        self._drafts = {number: Trial(number, kind, params, task)}
        return self._drafts[number]

    def propose(self, kind: Kind, params: Params) -> None:
        """Has a trial be tried that no searcher suggests, unless it was."""
        known = [(trial.kind, trial.params) for trial in self.trials.values()]
        if (kind, params) not in (*known, *self.proposals):
            self.proposals.append((kind, params))

    def admit(self, config: Mapping[str, object]) -> Trial:
        """Tune has a trial of this configuration. Raises ForeignTrialError."""
        params = dict(config)
        number, kind = params.pop("number", None), params.pop("kind", None)
        if not isinstance(number, int) or number in self.trials:
            raise ForeignTrialError(f"trial {number!r}")
        trial = self._drafts.pop(number, None)
        if trial is None or (trial.kind, trial.params) != (kind, params):
            task = self.tasks.possible(kind, params)  # type: ignore[arg-type]
            if task is None:
                raise ForeignTrialError(f"trial {number}: {params}")
            trial = Trial(number, kind, params, task)  # type: ignore[arg-type]
        self.trials[number] = trial
        if trial.chosen:
            self.seen.setdefault(trial.name, trial)
        entry = self._earlier.get(number)
        if entry and entry.status == "stopped" and (entry.kind, entry.params) == (kind, params):
            trial.reached, trial.reason = entry.reached, entry.reason
        self.changed = True
        return trial

    def was_stopped(self, trial: Trial) -> bool:
        """Whether an earlier call has stopped it before its end; what Tune knew of it may be lost."""
        entry = self._earlier.get(trial.number)
        return entry is not None and entry.status == "stopped" and entry.params == trial.params

    def reason(self, trial: Trial) -> str | None:
        """Why an earlier call ended it."""
        entry = self._earlier.get(trial.number)
        return entry.reason if entry and entry.params == trial.params else None

    def over(self, trial: Trial, *, quiet: bool = False) -> None:
        """A trial has got its status, reason and metrics."""
        if trial.status == "succeeded" and score(trial, self.plan.metric) is None:
            trial.status, trial.reason = "failed", f"its last stage has no {self.plan.metric.recorded}"
        self.changed = True
        if not quiet:
            self.progress.ended(trial, list(self.trials.values()))

    def save(self) -> None:
        """search.json as it stands, if anything has changed and it is time; compact, as it is written often."""
        if self.changed and time.monotonic() >= self._due:
            began = time.monotonic()
            self.plan.out.write(RESULT, json.dumps(self.result("running").content()).encode())
            ended = time.monotonic()
            self._due, self.changed = ended + max(WRITTEN_S, SHARE * (ended - began)), False

    def write(self, status: str) -> SearchRecord:
        """search.json at the end of a call."""
        result = self.result(status)
        records.write(self.plan.out, RESULT, result)
        return result

    def result(self, status: str) -> SearchRecord:
        """What is known now."""
        plan, campaign = self.plan, self.campaign
        trials, metric, space = sorted(self.trials.values(), key=lambda t: t.number), plan.metric, plan.space
        own = [trial for trial in trials if trial.kind != "full"]
        best, trained = best_chain(trials, metric), set(campaign.trained)
        requested, done = ratio(trials, trained)
        of_chains = ratio([trial for trial in trials if trial.chosen], trained)
        baseline = next((t for t in own if t.kind == "control" and t.params == baseline_choices(plan)), None)
        begun = {job.trial.number: job.keys for job in (*campaign.running, *campaign.cut)}
        entries = {trial.number: self._entry(trial) for trial in trials}
        if status in ("running", "interrupted"):  # what an earlier call knew, until it is found again
            entries = self._earlier | entries
        return SearchRecord(
            name=plan.experiment.name,
            status=status,
            identity=self._identity,
            metric=metric.recorded,
            metrics=written_down(plan.base.suite.definitions),
            config=plan.experiment.model_dump(mode="json"),
            space_size=space.size,
            trials=[entries[number] for number in sorted(entries)],
            pareto=[self._entry(trial) for trial in pareto(own, metric)],
            best=self._entry(best) if best else None,
            baseline=BaselineRecord(
                model=space.baseline.model,
                epochs=baseline.chain[0].epochs if baseline else str(space.baseline.epochs),
                macs=baseline.macs if baseline else space.baseline_macs,
                metrics=baseline.metrics if baseline else {},
            ),
            comparisons=comparisons(own, best, metric) if best else [],
            stage_epochs_requested=requested,
            stage_epochs_trained=done,
            stage_epochs_of_chains=dict(zip(("requested", "trained"), of_chains, strict=True)),
            proxy=proxy_record(plan.search.proxy, trials, metric),
            asha=self.asha,
            tune=self._versions,
            trained=sorted(trained),
            begun={str(number): keys for number, keys in begun.items()},
        )

    def _entry(self, trial: Trial) -> TrialRecord:
        """The trial's record; of trials that are over it is made once."""
        entry = self._entries.get(trial.number)
        if entry is None or entry.reached != trial.reached:
            entry = trial_record(trial)
        if trial.status != "running":
            self._entries[trial.number] = entry
        return entry
