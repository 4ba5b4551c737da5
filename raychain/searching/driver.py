"""A search from its plan to search.json: a Tuner, the campaign that trains what its trials want, and going on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raychain import records
from raychain.backend_ray.connection import session
from raychain.backend_ray.environment import environment
from raychain.backend_ray.internals import many_processes
from raychain.core.json import Json
from raychain.errors import Interrupted, RunFailed
from raychain.lease import LEASE, Lease, patience
from raychain.pages.writing import leave_report
from raychain.reporting.search_progress import SearchProgress
from raychain.runs.driver import failing, stop_signals
from raychain.searching.book import Book
from raychain.searching.campaign import Campaign
from raychain.searching.continuing import RESULT, earlier
from raychain.searching.controls import baseline_macs, make_rungs, proposed
from raychain.searching.judging import Rungs
from raychain.searching.known import Known
from raychain.searching.outcome import best_chain
from raychain.searching.reports import Reporter
from raychain.searching.request import Plan
from raychain.searching.result import write_best
from raychain.searching.running import RayRunner, slots
from raychain.searching.tasks import Tasks

if TYPE_CHECKING:
    from ray.tune import ResultGrid


@dataclass(frozen=True)
class Searched:
    """What a search has found."""

    record: Json
    """search.json."""
    results: ResultGrid
    """Tune's results of every trial, controls included."""

    @property
    def best(self) -> Json:
        """The best chain's trial."""
        found: Json = self.record["best"]
        return found

    @property
    def front(self) -> list[Json]:
        """The trials that no other beats in both metric and MACs, cheapest first."""
        found: list[Json] = self.record["pareto"]
        return found


def run_search(plan: Plan, *, address: str | None = None, verbose: bool = False) -> Searched:
    """Searches, or goes on with a search of the same settings in the same folder.

    Raises RunFailed where no chain could be trained, Interrupted after a signal; what was trained is kept.
    """
    with failing(plan.out.address), Lease(plan.out, LEASE) as lease:
        progress = SearchProgress(plan.search.trials, plan.metric)
        lease.acquire(patience(f"{plan.out.address} is in use", progress.say))
        call = _Call(plan, progress, verbose=verbose)
        try:
            with session(plan.base, address, verbose), _said(verbose):
                return call.run(slots(plan))
        finally:
            leave_report(plan.out)


class _Call:
    """One call of a search."""

    def __init__(self, plan: Plan, progress: SearchProgress, *, verbose: bool) -> None:
        self.plan, self.progress, self.verbose = plan, progress, verbose
        self.tasks = Tasks(plan)
        self.baseline = baseline_macs(plan, self.tasks)
        check(plan, make_rungs(plan, self.baseline))
        self.before = earlier(plan, self.tasks.possible)

    def run(self, groups: int) -> Searched:
        """Through `Tuner.restore` where that can be; else a new Tuner begins with what search.json remembers."""
        from raychain.searching.tune import tuner  # here, so that wrong input costs no import of Tune

        restore = tuner.can_restore(self.plan.out, self.before)
        with environment(tuner.settings(groups)):
            try:
                return self._searched(groups, restore=restore)
            except tuner.DamagedStateError as error:
                if not restore:
                    raise
                records.warn(f"{self.plan.out.address}/{tuner.NAME}: {error}; {RESULT} is taken instead")
                return self._searched(groups, restore=False)

    def _searched(self, groups: int, *, restore: bool) -> Searched:
        from raychain.searching.tune import tuner
        from raychain.searching.tune.desk import Desk

        plan, before = self.plan, self.before
        book = Book(plan, self.tasks, before, self.progress, tuner.versions())
        runner = RayRunner(plan, self.progress, verbose=self.verbose)
        desk = Desk(runner)
        book.campaign = campaign = Campaign(
            runner,
            groups,
            known=Known(plan, self.progress),
            reporter=Reporter(plan.metric, self.baseline),
            audience=desk,
            begun={int(number): keys for number, keys in ((before and before.begun) or {}).items()},
            trained=(before and before.trained) or (),
        )
        if not restore:
            tuner.put_aside(plan.out)
        self.progress.opening(groups, plan.space.size)

        def stop() -> None:
            runner.stop()
            desk.interrupt()

        try:
            with stop_signals(stop):
                desk.start(campaign)
                rungs = make_rungs(plan, self.baseline)
                grid = tuner.fit(book, desk, groups, rungs=rungs, seeds=proposed(plan, self.tasks), restore=restore)
                desk.end()
        except tuner.DamagedStateError:
            desk.end()
            raise
        except BaseException:
            if book.trials:  # else what search.json has of an earlier call is all there is
                with contextlib.suppress(OSError):
                    book.write("interrupted")
            raise
        finally:
            desk.close()
        return self._outcome(book, grid, interrupted=desk.interrupted)

    def _outcome(self, book: Book, grid: ResultGrid, *, interrupted: bool) -> Searched:
        best = best_chain(book.trials.values(), self.plan.metric)
        if interrupted:
            book.write("interrupted")
            raise Interrupted
        if best is None:
            book.write("failed")
            reasons = {trial.reason for trial in book.trials.values() if trial.reason}
            if {trial.status for trial in book.trials.values()} == {"stopped"}:
                raise RunFailed(
                    f"no chain came to its end: {'; '.join(sorted(reasons))}; what was trained is kept, and who was "
                    "stopped stays so: go on with a later `stop` or a gentler scheduler, and with more `trials`"
                )
            raise RunFailed("no chain could be trained: " + "; ".join(sorted(reasons)))
        write_best(self.plan.out, self.tasks.experiment(best.params))
        return Searched(book.write("succeeded").content(), grid)


def check(plan: Plan, rungs: Rungs | None) -> None:
    """Makes once what the experiment names of Tune's, so that what is wrong with it is told before anything starts."""
    search = plan.search
    if search.scheduler or search.stop or search.callbacks or search.sampler not in ("tpe", "random", "grid"):
        from raychain.searching.tune.tuner import make_parts

        make_parts(plan, rungs)


@contextlib.contextmanager
def _said(verbose: bool) -> Iterator[None]:
    """Within, Tune says nothing, and Ray nothing of its processes, but to who wants to know."""
    log = logging.getLogger("ray.tune")
    before = log.level
    log.setLevel(logging.INFO if verbose else logging.CRITICAL)
    try:
        with contextlib.nullcontext() if verbose else many_processes():
            yield
    finally:
        log.setLevel(before)
