"""The driver: starts or joins Ray, lets one worker group train the unfinished stages, keeps the run folder."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raychain.chain.plan import totals, worker_cpus
from raychain.errors import Interrupted, RunFailed
from raychain.reporting.environment import environment
from raychain.reporting.health import DataHealth
from raychain.reporting.progress import Progress
from raychain.reporting.runlog import RUN, RunLog
from raychain.reporting.trackers import Trackers
from raychain.storage import Folder
from raychain.training.stage import STAGE_RECORD
from raychain.training.task import ChainTask
from raychain.training.worker import Mailbox, train_chain

POLL_S = 0.2


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
        cpus = max(os.cpu_count() or 1, math.ceil(compute.workers * worker_cpus(task.experiment)))
        ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=256 * 2**20, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _execute(
    task: ChainTask,
    handlers: Sequence[Callable[[dict[str, Any]], None]],
    verbose: bool,
    spoilt: Callable[[], bool],
) -> bool:
    """Trains on Ray until the chain is complete (True), or a signal or `spoilt` had the workers save and return."""
    compute = task.experiment.compute
    mailbox: Any = ray.remote(num_cpus=0)(Mailbox).remote()
    resources: dict[str, float] = {"CPU": worker_cpus(task.experiment)}
    if compute.gpus_per_worker:
        resources["GPU"] = compute.gpus_per_worker
    name = f"ray-{uuid.uuid4().hex[:8]}"
    storage = Folder(task.out)
    trainer = TorchTrainer(
        train_chain,  # type: ignore[arg-type]
        train_loop_config={"task": task, "mailbox": mailbox},
        scaling_config=ScalingConfig(
            num_workers=compute.workers, use_gpu=compute.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if compute.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=storage.path,
            storage_filesystem=None if storage.local else storage.fs,
            failure_config=FailureConfig(max_failures=compute.max_failures, controller_failure_limit=3),  # type: ignore[call-arg]
        ),
    )
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["value"] = trainer.fit().return_value  # type: ignore[attr-defined]
        except BaseException as error:  # reported by the thread that waits
            outcome["error"] = error

    if not verbose:
        logging.getLogger("ray.train").setLevel(logging.ERROR)
    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    try:
        with _stop_signals(lambda: mailbox.request_stop.remote()):
            while thread.is_alive():
                thread.join(POLL_S)
                _drain(mailbox, handlers)
                if spoilt():
                    mailbox.request_stop.remote()
        _drain(mailbox, handlers)
    finally:
        storage.delete(name)
    if "error" in outcome:
        raise RunFailed(_reason(outcome["error"])) from outcome["error"]
    return bool(outcome["value"])


def _drain(mailbox: Any, handlers: Sequence[Callable[[dict[str, Any]], None]]) -> None:
    with contextlib.suppress(ray.exceptions.RayError):
        for event in ray.get(mailbox.drain.remote(), timeout=30):
            for handle in handlers:
                handle(event)


@contextlib.contextmanager
def _stop_signals(request_stop: Callable[[], Any]) -> Iterator[None]:
    """The first SIGINT or SIGTERM lets the workers save and return, the second ends the driver at once."""
    asked: list[int] = []

    def stop(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
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


def _reason(error: BaseException) -> str:
    """The workers' own error, without the layers of Ray around it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, failure = next(iter(sorted(failures.items())))
        cause = getattr(failure, "cause", None) or failure
        return f"worker {rank}: {str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__}"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
