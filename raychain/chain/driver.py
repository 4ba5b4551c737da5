"""The driver: starts or joins Ray, lets one worker group train the unfinished stages, keeps the run folder."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from raychain.chain.group import Groups
from raychain.chain.plan import totals, worker_cpus
from raychain.errors import Interrupted, RunFailed
from raychain.reporting.environment import environment
from raychain.reporting.events import Event
from raychain.reporting.health import DataHealth
from raychain.reporting.progress import Progress
from raychain.reporting.runlog import RUN, RunLog
from raychain.reporting.trackers import Trackers
from raychain.storage import Folder
from raychain.training.stage import STAGE_RECORD
from raychain.training.task import ChainTask


def run_chain(task: ChainTask, *, address: str | None = None, verbose: bool = False) -> dict[str, Any]:
    """Trains what is not published yet; returns the content of run.json.

    Raises RunFailed or Interrupted; run.json says so too, and what was trained is kept.
    """
    out, started = Folder(task.out), time.time()
    records = [_published(out, stage.folder, stage.key) for stage in task.stages]
    header = {
        "name": task.experiment.name,
        "config": task.experiment.model_dump(mode="json"),
        "environment": environment(),
    }
    health = DataHealth(task.shards, task.experiment.data.max_bad_fraction, out.read_json(RUN))
    log = RunLog(out, header | {"data_health": health.record()}, records)
    if health.exceeded:
        log.finish("failed", totals(task, time.time() - started))
        raise RunFailed(health.describe())
    if all(records):
        log.finish("succeeded", totals(task, time.time() - started))
        return log.run
    _set_aside(out, task)
    progress = Progress(len(task.stages))
    steps = [stage.steps for stage in task.stages]
    trackers = Trackers(out, task.experiment, task.stages[-1].key, steps, progress.handle)

    def finish(status: str) -> None:
        log.note("data_health", health.record())
        final = totals(task, time.time() - started)
        try:
            log.finish(status, final)
        finally:
            trackers.finish(status, final)

    try:
        handlers = [health.handle, log.handle, trackers.handle, progress.handle]
        with progress, _session(task, address, verbose):
            complete = _execute(task, handlers, verbose, lambda: health.exceeded)
        if health.exceeded:
            raise RunFailed(health.describe())
    except BaseException as error:
        finish("interrupted" if isinstance(error, KeyboardInterrupt | Interrupted) else "failed")
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted from None
        raise
    finish("succeeded" if complete else "interrupted")
    if not complete:
        raise Interrupted
    return log.run


def _published(out: Folder, folder: str, key: str) -> dict[str, Any] | None:
    record = out.read_json(f"stages/{folder}/{STAGE_RECORD}")
    if not isinstance(record, dict) or record.get("key") != key:
        return None
    return {name: value for name, value in record.items() if name != "files"} | {"status": "reused"}


def _set_aside(out: Folder, task: ChainTask) -> None:
    """Stage folders of another experiment under the same name are kept beside, never overwritten."""
    for stage in task.stages:
        record = out.read_json(f"stages/{stage.folder}/{STAGE_RECORD}")
        if isinstance(record, dict) and record.get("key") != stage.key:
            out.move(f"stages/{stage.folder}", f"stages/{stage.folder}.{str(record.get('key'))[:8]}")
        elif record is None and not stage.published:
            out.delete(f"stages/{stage.folder}")


@contextlib.contextmanager
def _session(task: ChainTask, address: str | None, verbose: bool) -> Iterator[None]:
    """A Ray connection: an existing one of this process, the cluster at `address` or RAY_ADDRESS, or a local one."""
    if ray.is_initialized():
        yield
        return
    compute = task.experiment.compute
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address or os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, **options)
    else:
        cpus = max(os.cpu_count() or 1, math.ceil(compute.max_workers * worker_cpus(task.experiment)))
        ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=256 * 2**20, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _execute(
    task: ChainTask,
    handlers: Sequence[Callable[[Event], None]],
    verbose: bool,
    spoilt: Callable[[], bool],
) -> bool:
    """Trains on Ray until the chain is complete (True), or a signal or `spoilt` had the workers save and return."""
    groups = Groups(task, handlers, verbose=verbose)
    with _stop_signals(groups.stop):
        return groups.run(spoilt)


@contextlib.contextmanager
def _stop_signals(request_stop: Callable[[], Any]) -> Iterator[None]:
    """The first SIGINT or SIGTERM lets the workers save and return, the second ends the driver at once."""
    asked: list[int] = []

    def stop(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("raychain: stopping: the workers save their state (again: stop at once)", file=sys.stderr, flush=True)
        request_stop()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
