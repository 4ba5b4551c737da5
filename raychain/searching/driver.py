"""A search from its experiment to search.json: phases, sampling, continuing after an interruption."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence

from raychain import records
from raychain.backend_ray.connection import session
from raychain.core.storage import Folder
from raychain.core.wording import macs
from raychain.errors import InputError, Interrupted, RunFailed
from raychain.evaluators.metrics import written_down
from raychain.lease import LEASE, Lease, patience
from raychain.pages.writing import leave_report
from raychain.records import (
    BaselineRecord,
    SearchRecord,
    StageEntry,
    StageRecord,
    TrialRecord,
)
from raychain.reporting.search_progress import SearchProgress
from raychain.runs.driver import failing, stop_signals
from raychain.runs.store import STORE, StageStore
from raychain.runs.takeover import take_over_in_store
from raychain.searching.campaign import Campaign, Job, Kind, Measured, Step, Trial, ratio
from raychain.searching.continuing import RESULT, earlier, identity
from raychain.searching.controls import checks, controls, equal_macs, make_halving
from raychain.searching.halving import Point, Verdict
from raychain.searching.outcome import best_chain, comparisons, pareto, score
from raychain.searching.request import Plan
from raychain.searching.result import proxy_record, trial_record, write_best
from raychain.searching.running import RayRunner, slots
from raychain.searching.sampling import Sampler, make_sampler
from raychain.searching.space import CHAIN, Params
from raychain.searching.tasks import UNKNOWN, Tasks
from raychain.training.finished import STAGE_RECORD
from raychain.training.states import trunk_states
from raychain.training.task import ChainTask

TRIES = 50
"""Choices that are asked of a sampler for one new affordable chain, before the space is walked through."""


Chosen = Callable[[Plan, Tasks, Sequence[Trial]], Iterator[Params]]


def run_search(plan: Plan, *, address: str | None = None, verbose: bool = False) -> SearchRecord:
    """Searches, or goes on with a search of the same settings in the same folder; returns search.json.

    Raises RunFailed where no chain could be trained, Interrupted after a signal; what was trained is kept.
    """
    with failing(plan.out.address), Lease(plan.out, LEASE) as lease:
        progress = SearchProgress(plan.search.trials, plan.metric)
        lease.acquire(patience(f"{plan.out.address} is in use", progress.say))
        searcher = Searcher(plan, progress)
        try:
            with session(plan.base, address, verbose):
                return searcher.run(slots(plan), verbose=verbose)
        finally:
            leave_report(plan.out)


class Searcher:
    """One search at work."""

    def __init__(self, plan: Plan, progress: SearchProgress) -> None:
        self.plan, self.progress = plan, progress
        search, self.space = plan.search, plan.space
        self.sampler: Sampler = make_sampler(
            plan.space, search.sampler, search.seed, pareto=search.aim == "pareto", best=plan.metric.best
        )
        self.store = StageStore(Folder(plan.store))
        self.tasks = Tasks(plan)
        self.identity = identity(plan)
        self.before = earlier(plan, self.tasks.possible)
        begun = (self.before and self.before.begun) or {}
        self.trained: set[str] = set((self.before and self.before.trained) or ())
        self.earlier: dict[str, int] = {key: int(number) for number, keys in begun.items() for key in keys}
        self.halving = make_halving(plan, self.tasks, self.before)
        self.seeds: Iterator[Params] = iter(())
        self.seen: dict[str, Trial] = {}
        self.sampled = 0
        self.walk: Iterator[Params] | None = None
        self.campaign: Campaign
        self.unsaved = False
        self._entries: dict[int, TrialRecord] = {}

    def run(self, slots: int, *, verbose: bool) -> SearchRecord:
        """All phases: chosen chains with the controls, models alone at the best chain's MACs, the proxy's check."""
        runner = RayRunner(self.progress.of, verbose=verbose)
        self.campaign = campaign = Campaign(
            runner,
            slots,
            known=self._known,
            begun=self._begin,
            finished=self._finished,
            measured=self._measured,
            ended=self._ended,
            idle=self._save,
        )
        self.progress.opening(slots, self.space.size)

        def stop() -> None:
            campaign.stopping = True
            runner.stop()

        with stop_signals(stop):
            try:
                complete = self._phases(slots)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._write("interrupted")
                raise
        if not complete:
            self._write("interrupted")
            raise Interrupted
        best = best_chain(campaign.trials.values(), self.plan.metric)
        if best is None:
            self._write("failed")
            reasons = {trial.reason for trial in campaign.trials.values() if trial.reason}
            raise RunFailed("no chain could be trained: " + "; ".join(sorted(reasons)))
        write_best(self.plan.out, self.tasks.experiment(best.params))
        return self._write("succeeded")

    def _phases(self, slots: int) -> bool:
        self._restore()
        self.seeds = self._planned()
        for params in controls(self.plan):
            self._propose("control", params)
        if not self.campaign.run(lambda: self._sample(slots)):
            return False
        later: tuple[tuple[Kind, Chosen], ...] = (("equal-macs", equal_macs), ("full", checks))
        for kind, chosen in later:
            for params in chosen(self.plan, self.tasks, list(self.campaign.trials.values())):
                self._propose(kind, params)
            if not self.campaign.run(lambda: None):
                return False
        return True

    def _restore(self) -> None:
        """The trials of an earlier call, those first that were under way."""
        self.progress.quiet = True
        entries = sorted((self.before and self.before.trials) or (), key=lambda entry: entry.number)
        begun = set(map(int, (self.before and self.before.begun) or {}))
        for entry in entries:
            trial = self._restored(entry)
            if trial is None:
                records.warn(f"{RESULT}: trial {entry.number} is none of this search, and left out")
                continue
            self.sampled += trial.kind in ("planned", "sampled")
            self.seen.setdefault(self._name(trial), trial)
            if entry.status == "stopped":
                trial.status, trial.reason, trial.reached = "stopped", entry.reason, entry.reached
                self.campaign.trials[trial.number] = trial
                self._ended(trial)
            else:
                self.campaign.resume(trial) if entry.number in begun else self.campaign.add(trial)
        self.progress.quiet = False
        if entries:
            self.progress.continued(len(entries) - self.campaign.waiting(), self.campaign.waiting())

    def _restored(self, entry: TrialRecord) -> Trial | None:
        """A trial of an earlier call; None where its choices are not of this search."""
        kind, params, number = entry.kind, entry.params, entry.number
        if number in self.campaign.trials:
            return None
        try:
            fixed = self.sampler.ask(params) if kind in ("planned", "sampled") else params
        except UNKNOWN:
            return None
        task = self.tasks.possible(kind, fixed or params)
        return self._trial(kind, fixed or params, number, task) if task else None

    def _planned(self) -> Iterator[Params]:
        found: set[str] = set()
        with contextlib.suppress(InputError):  # the planner may have nothing for such a family
            for params in self.space.planned():
                if len(found) == self.plan.search.seeds:
                    return
                task = self.tasks.task("planned", params) if self.space.affordable(params) else None
                if task is not None and task.stages[-1].key not in found:
                    found.add(task.stages[-1].key)
                    yield params

    def _sample(self, slots: int) -> Trial | None:
        """A new trial, if it is time for one."""
        search = self.plan.search
        learns = search.sampler == "tpe"
        if self.sampled >= search.trials or (learns and self.campaign.waiting() >= 2 * slots + self._alone()):
            return None
        for params in self.seeds:
            asked = self.sampler.ask(params) or params
            if trial := self._new("planned", asked):
                return trial
        for _ in range(TRIES):
            asked_params = self.sampler.ask()
            if asked_params is None:
                break
            if trial := self._new("sampled", asked_params):
                return trial
        self.walk = self.walk or self.space.points()
        for params in self.walk:
            if self.space.affordable(params) and (trial := self._new("sampled", params, asked=False)):
                return trial
        return None

    def _alone(self) -> int:
        return sum(t.status == "running" and t.kind == "control" for t in self.campaign.trials.values())

    def _new(self, kind: Kind, params: Params, *, asked: bool = True) -> Trial | None:
        """A trial of these choices; None, and the sampler knows, where they are too expensive or nothing new."""
        task = self.tasks.task(kind, params) if self.space.affordable(params) else None
        known = self.seen.get(task.stages[-1].key) if task else None
        if task is None or known is not None:
            if asked:
                self._tell(params, known)
            return None
        if not asked:
            self.sampler.ask(params)
        trial = self._trial(kind, params, task=task)
        self.seen[self._name(trial)] = trial
        if self._begins_behind(trial):
            self._tell(params, trial)
            return None
        self.sampled += 1
        return trial

    def _propose(self, kind: Kind, params: Params) -> None:
        """Adds a trial that is no sampler's, unless it is there; one that cannot be trained is left out."""
        if any(trial.kind == kind and trial.params == params for trial in self.campaign.trials.values()):
            return
        if (task := self.tasks.task(kind, params)) is not None:
            self.campaign.add(self._trial(kind, params, task=task))

    def _trial(self, kind: Kind, params: Params, number: int | None = None, task: ChainTask | None = None) -> Trial:
        task = task or self.tasks.task(kind, params)
        assert task is not None, "it was possible before"
        number = max(self.campaign.trials, default=-1) + 1 if number is None else number
        return Trial(number, kind, params, task)

    def _name(self, trial: Trial) -> str:
        return trial.task.stages[-1].key

    def _tell(self, params: Params, trial: Trial | None) -> None:
        """The sampler hears what became of choices that it was asked for; None: they cannot be tried."""
        value = score(trial, self.plan.metric) if trial else None
        verdict = self.halving.ended(trial.keys) if trial and self.halving and value is None else None
        if verdict:
            self.sampler.tell(params, (verdict.value, verdict.macs), whole=False)
        else:
            self.sampler.tell(params, None if trial is None or value is None else (value, float(trial.macs)))

    def _known(self, step: Step) -> StageEntry | None:
        """The record of a stage, or of a part of a trunk, that the storage has already; None where the stage is to be
        trained, or measured."""
        if not step.whole:
            state = trunk_states(self.plan.store, step.stage.trunk).marker(int(step.key.partition("@")[2]))
            return StageEntry(key=step.key) if state else None
        if not self.store.has(step.key):
            take_over_in_store(self.plan.base, step.stage, self.store, self.progress.say)
        if not self.store.has(step.key):
            return None
        record = records.read(self.store.storage, f"{STORE}/{step.key}/{STAGE_RECORD}", StageRecord)
        suite = self.plan.base.suite
        return suite.shown(record) if record is not None and not suite.missing(record) else None

    def _begin(self, job: Job) -> None:
        last = job.trial.task.stages[-1]
        folder, former = f"chains/{last.key[:12]}", f"chains/{last.former.key[:12]}"
        if not self.plan.out.exists(folder) and self.plan.out.exists(former):  # which has what is left of its stages
            self.plan.out.move(former, folder)
        self.unsaved = True
        self.progress.begin(job)

    def _finished(self, key: str, record: StageEntry, job: Job | None) -> None:
        """A stage is there: trained by this search, now or before it was interrupted, or by somebody else."""
        if (job and record.status == "trained") or (job is None and key in self.earlier):
            self.trained.add(key)
        chains = [trial for trial in self._chains() if key in trial.keys[:-1]]
        if chains and (verdict := self._judge(chains[0], chains[0].keys.index(key))):
            self.campaign.drop(chains, self._why(verdict))

    def _measured(self, found: Measured) -> None:
        """A stage was measured on its way; at its end it is judged when it is there."""
        trial, place, metric = found.job.trial, found.place, self.plan.metric
        stage = trial.task.stages[place]
        value = metric.value(found.metrics)
        if self.halving is None or not 0 < found.step < stage.steps or value is None:
            return
        needing = [t for t in self.campaign.trials.values() if t.status == "running" and stage.key in t.keys]
        chains = self._chains()
        if all(t in chains for t in needing):  # a control needs its stage in any case
            spent = sum(s.macs for s in trial.task.stages[:place]) + stage.macs * found.step / stage.steps
            if verdict := self.halving.judge(trial.keys[: place + 1], Point(spent, value)):
                self.campaign.drop(needing, self._why(verdict))

    def _chains(self) -> list[Trial]:
        """Trials that could be stopped."""
        trials = self.campaign.trials.values() if self.halving else ()
        return [t for t in trials if t.status == "running" and t.kind in ("planned", "sampled")]

    def _judge(self, trial: Trial, place: int) -> Verdict | None:
        """The verdict on chains that begin with the finished stages up to `place` of the trial's."""
        keys = trial.keys[: place + 1]
        value = self.plan.metric.value(self.campaign.records[keys[-1]].metrics or {})
        if self.halving is None or value is None:
            return None
        return self.halving.judge(keys, Point(sum(s.macs for s in trial.task.stages[: place + 1]), value))

    def _begins_behind(self, trial: Trial) -> bool:
        """Its first stages are there and are behind others, so that nothing more is trained."""
        if self.halving is None or self.halving.ended(trial.keys):
            return self.halving is not None
        known = [place for place, key in enumerate(trial.keys[:-1]) if key in self.campaign.records]
        return any(self._judge(trial, place) for place in known)

    def _why(self, verdict: Verdict) -> str:
        assert self.plan.search.asha
        metric, factor = self.plan.metric, self.plan.search.asha.reduction_factor
        return (
            f"behind at {macs(verdict.macs)} MACs: {metric.label} {metric.written(verdict.value)}, where the best "
            f"1/{factor:g} of {verdict.rivals} have {metric.written(verdict.needed)}"
        )

    def _ended(self, trial: Trial) -> None:
        record = self.campaign.records.get(trial.keys[-1])
        if trial.status == "succeeded" and not (record and trial.task.measured(record)):
            trial.status, trial.metrics = "failed", {}
            trial.reason = "its last stage was measured on other data before: give another --out or storage"
        elif trial.status == "succeeded" and score(trial, self.plan.metric) is None:
            trial.status, trial.reason = "failed", f"its last stage has no {self.plan.metric.recorded}"
        if trial.kind in ("planned", "sampled"):
            self._tell(trial.params, trial)
        self.progress.ended(trial, list(self.campaign.trials.values()))
        self.unsaved = True

    def _save(self) -> None:
        """search.json as it stands, if anything has changed; compact, as it is written often."""
        if self.unsaved:
            self.plan.out.write(RESULT, json.dumps(self._result("running").content()).encode())
            self.unsaved = False

    def _write(self, status: str) -> SearchRecord:
        result = self._result(status)
        records.write(self.plan.out, RESULT, result)
        return result

    def _result(self, status: str) -> SearchRecord:
        trials, metric = sorted(self.campaign.trials.values(), key=lambda t: t.number), self.plan.metric
        own = [trial for trial in trials if trial.kind != "full"]
        best = best_chain(trials, metric)
        requested, trained = ratio(trials, self.trained)
        of_chains = ratio([trial for trial in trials if trial.kind in ("planned", "sampled")], self.trained)
        baseline = next((t for t in own if t.kind == "control" and t.params == {
            CHAIN: self.space.baseline.model, "length": str(self.space.baseline.epochs)}), None)  # fmt: skip
        begun = {job.trial.number: job.keys for job in (*self.campaign.running, *self.campaign.cut)}
        return SearchRecord(
            name=self.plan.experiment.name,
            status=status,
            identity=self.identity,
            metric=metric.recorded,
            metrics=written_down(self.plan.base.suite.definitions),
            config=self.plan.experiment.model_dump(mode="json"),
            space_size=self.space.size,
            trials=[self._entry(trial) for trial in trials],
            pareto=[self._entry(trial) for trial in pareto(own, metric)],
            best=self._entry(best) if best else None,
            baseline=BaselineRecord(
                model=self.space.baseline.model,
                epochs=baseline.chain[0].epochs if baseline else str(self.space.baseline.epochs),
                macs=baseline.macs if baseline else self.space.baseline_macs,
                metrics=baseline.metrics if baseline else {},
            ),
            comparisons=comparisons(own, best, metric) if best else [],
            stage_epochs_requested=requested,
            stage_epochs_trained=trained,
            stage_epochs_of_chains=dict(zip(("requested", "trained"), of_chains, strict=True)),
            proxy=proxy_record(self.plan.search.proxy, trials, metric),
            asha=self.halving.state() if self.halving else None,
            trained=sorted(self.trained),
            begun={str(number): keys for number, keys in begun.items()},
        )

    def _entry(self, trial: Trial) -> TrialRecord:
        """The trial's record; of trials that are over it is made once."""
        entry = self._entries.get(trial.number) or trial_record(trial)
        if trial.status != "running":
            self._entries[trial.number] = entry
        return entry
