"""The driver: starts or joins Ray, lets one worker group train the unfinished stages, keeps the run folder."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

from raychain import records, signals
from raychain.backend_ray.connection import session
from raychain.backend_ray.gauges import Gauges
from raychain.core.environment import environment
from raychain.core.storage import Folder, patiently
from raychain.errors import Interrupted, RunFailed, one_line
from raychain.evaluators.metrics import written_down
from raychain.evaluators.suite import Suite
from raychain.events import Event, Listener, Measured, Shared, StageEnded, Warned
from raychain.lease import LEASE, Holder, Lease, patience
from raychain.pages.card import Cards, leave_cards
from raychain.pages.writing import leave_report
from raychain.records import ConfigRecord, RunRecord, StageEntry
from raychain.reporting.health import DataHealth
from raychain.reporting.progress import Progress
from raychain.reporting.runlog import RUN, RunLog
from raychain.reporting.trackers import Trackers
from raychain.runs.group import Groups
from raychain.runs.origins import publish
from raychain.runs.store import StageStore, UnusableStageError, usable
from raychain.runs.takeover import take_over
from raychain.runs.totals import totals
from raychain.terminal import say
from raychain.training.task import ChainTask, StageTask


class Watch(NamedTuple):
    """Somebody who runs several chains at once: hears of their events instead of a person, and can stop them."""

    listener: Listener
    stop: threading.Event


def run_chain(
    task: ChainTask, *, address: str | None = None, verbose: bool = False, watch: Watch | None = None
) -> RunRecord:
    """Trains what is not published yet; returns run.json.

    Waits for a driver that is at work on the same run folder, and for those that train a stage of it for another.
    Raises RunFailed or Interrupted; run.json says so too, and what was trained is kept. With `watch` nothing is shown.
    """
    out = Folder(task.out)
    store = StageStore(Folder(task.store)) if task.store else None
    with failing(task.out), contextlib.ExitStack() as stack:
        lease = stack.enter_context(Lease(out, LEASE))
        lease.acquire(patience(f"{task.out} is in use", _say))
        take_over(task, out, store, _say)
        finished = [_claim(stage, task, out, store, stack) for stage in task.stages]
        for stage, record in zip(task.stages, finished, strict=True):
            if stage.start and record is None:
                _claim(stage.start, task, out, store, stack)
        stages = [replace(stage, published=bool(record)) for stage, record in zip(task.stages, finished, strict=True)]
        try:
            return _run(replace(task, stages=tuple(stages)), out, store, finished, lease, address, verbose, watch)
        finally:
            with signals.settled():
                leave_report(out)
                leave_cards(out)


def _run(
    task: ChainTask,
    out: Folder,
    store: StageStore | None,
    finished: Sequence[StageEntry | None],
    lease: Lease,
    address: str | None,
    verbose: bool,
    watch: Watch | None,
) -> RunRecord:
    """`run_chain` once the stages that have no record are this driver's."""
    started = time.time()
    health = DataHealth(task.shards, task.experiment.data.max_bad_fraction, records.take(out, RUN, RunRecord))
    header = RunRecord(
        name=task.experiment.name,
        config=ConfigRecord.of(task.experiment.model_dump(mode="json")),
        environment=environment(),
        metrics=written_down(task.suite.definitions),
        score=score.name if (score := task.experiment.evaluate.judged_by) else None,
        data_health=health.record(),
    )
    progress = Progress([stage.model for stage in task.stages], metrics=task.suite.definitions)
    show: Listener = watch.listener if watch else progress
    steps = [stage.steps for stage in task.stages]
    with signals.settled():  # run.json says `running` until `finish`
        log = RunLog(out, header, finished)
        if health.exceeded:
            log.finish("failed", totals(task, time.time() - started))
            raise RunFailed(health.describe())
        if all(record and task.measured(record) for record in finished):
            log.finish("succeeded", totals(task, time.time() - started))
            return log.run
        trackers = Trackers(out, task.experiment, task.stages[-1].key, steps, show.dispatch)

        def finish(status: str) -> None:
            log.run.data_health = health.record()
            final = totals(task, time.time() - started)
            try:
                log.finish(status, final)
            except OSError as error:
                raise RunFailed(f"{task.out} cannot be written: {error}") from error
            finally:
                trackers.finish(status, final.content())

        def spoilt() -> bool:
            return health.exceeded or lease.lost or (watch is not None and watch.stop.is_set())

        try:
            shown = contextlib.nullcontext() if watch else progress
            with (
                signals.released(),
                _sharing(task, out, store, show.dispatch) as share,
                shown,
                session(task, address, verbose),
            ):
                gauges = Gauges(out.path.rpartition("/")[2])
                listeners = [health, log, Cards(out, lambda: log.run), share, trackers, gauges, show]
                done = {stage.index for stage, record in zip(task.stages, finished, strict=True) if record}
                complete = _execute(Groups(task, listeners, done, verbose=verbose), spoilt)
            if health.exceeded:
                raise RunFailed(health.describe())
            if lease.lost:
                raise RunFailed(
                    f"{task.out} could not be written for too long: another driver may be at work on it now"
                )
        except BaseException as error:
            finish("interrupted" if isinstance(error, KeyboardInterrupt | Interrupted) else "failed")
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted from None
            raise
        finish("succeeded" if complete else "interrupted")
        if not complete:
            raise Interrupted
        return log.run


def _claim(
    stage: StageTask, task: ChainTask, out: Folder, store: StageStore | None, stack: contextlib.ExitStack
) -> StageEntry | None:
    """The record of a finished stage, or None once this driver is the one to train it. A given one is finished here.

    Where another driver trains it, it is waited for. All drivers claim in the order of the chain, so that two never
    wait for each other. A claim that is lost later, as the store cannot be written any more, stops nothing: at worst
    another driver trains the stage too.
    """
    suite = task.suite
    record = _reused(stage, suite, out, store)
    if record is None and stage.given:
        publish(task, stage)
        record = _reused(stage, suite, out, None)
    while store and record is None:
        lease = stack.enter_context(store.training(stage.key))
        told = patience(f"{stage.model} (stage {stage.key[:8]}) is being trained", _say)

        def wait(holder: Holder, told: Callable[[Holder], bool] = told) -> bool:
            return told(holder) and not store.has(stage.key)

        mine = lease.acquire(wait)
        record = _reused(stage, suite, out, store)  # who held the lease may have finished it
        if mine and record is None:
            break
        lease.release()
    return record


def _reused(stage: StageTask, suite: Suite, out: Folder, store: StageStore | None) -> StageEntry | None:
    """The record of a stage that is finished, from the run folder or else from the store."""
    name = f"stages/{stage.folder}"
    own = {"index": stage.index} | ({"origin": stage.origin} if stage.origin else {})
    record = store.adopt(stage.key, out, stage.folder, own) if store else usable(out, name, stage.key)
    return suite.shown(record, status="given" if stage.given else "reused") if record else None


class _Sharing(Listener):
    """Copies every finished stage to the store, in the background."""

    def __init__(
        self, task: ChainTask, out: Folder, store: StageStore, tell: Callable[[Event], None], pool: ThreadPoolExecutor
    ) -> None:
        self._task, self._out, self._store, self._tell, self._pool = task, out, store, tell, pool

    def stage_ended(self, event: StageEnded) -> None:
        self._pool.submit(self._contribute, self._task.stages[event.stage], event.record)

    def measured(self, event: Measured) -> None:
        self._pool.submit(self._contribute, self._task.stages[event.stage], event.record)

    def _contribute(self, stage: StageTask, record: StageEntry) -> None:
        storage = str(self._task.store)
        try:
            patiently(lambda: self._store.contribute(stage.key, self._out, stage.folder), storage)
            if measured := record.evaluations:
                patiently(lambda: self._store.add_results(stage.key, measured), storage)
        except (OSError, UnusableStageError) as error:
            self._tell(Warned(f"stage {stage.folder} is not shared through {storage}: {error}"))
        self._tell(Shared(stage.index, record))


@contextlib.contextmanager
def _sharing(
    task: ChainTask, out: Folder, store: StageStore | None, tell: Callable[[Event], None]
) -> Iterator[Listener]:
    """What shares the finished stages, where there is a store; its copies are waited for at the end."""
    with ThreadPoolExecutor(1, thread_name_prefix="share") as pool:
        yield _Sharing(task, out, store, tell, pool) if store else Listener()


def _execute(groups: Groups, spoilt: Callable[[], bool]) -> bool:
    """Trains on Ray until the chain is complete (True), or a signal or `spoilt` had the workers save and return."""
    try:
        with stop_signals(groups.stop):
            return groups.run(spoilt)
    finally:
        groups.close()


@contextlib.contextmanager
def failing(address: str) -> Iterator[None]:
    """Makes errors of storage, which name what they are about but not whose it is, errors of the run at `address`."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"{address}: {error}") from error


def _say(message: str) -> None:
    say(one_line(f"raychain: {message}"))


@contextlib.contextmanager
def stop_signals(request_stop: Callable[[], Any]) -> Iterator[None]:
    """The first signal lets the workers save and return, the second ends the driver at once."""

    def stop() -> None:
        request_stop()
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the signal came in the middle of printing
            _say("stopping: the workers save their state (again: stop at once)")

    with signals.saving(stop):
        yield
