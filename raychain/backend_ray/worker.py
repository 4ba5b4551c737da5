"""The Ray Train worker: a process group is up when `train_chain` is called on every worker.

Ray Train's controller and the mailbox import this module too, so what only the training needs is imported there: torch
and the models take seconds, which every start of a group would pay twice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

import ray

from raychain.errors import Diverged, InputError

if TYPE_CHECKING:
    from raychain.backend_ray.measuring import OnRay
    from raychain.backend_ray.preloading import PreloadLink
    from raychain.training.stage import ChainWorker
    from raychain.training.task import ChainTask

PUSH_S = 0.2


class Mailbox:
    """An actor between workers and driver: events one way, the wish to stop the other way."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.groups: list[Any] = []
        self.stop = False

    def push(self, events: list[dict[str, Any]]) -> bool:
        """Takes events; returns whether the driver wants the run stopped."""
        self.events += events
        return self.stop

    def drain(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        events, self.events = self.events, []
        return events

    def request_stop(self) -> None:
        """Asks the workers to save and return."""
        self.stop = True

    def resume(self) -> None:
        """A new worker group is to train."""
        self.stop = False

    def placed(self, group: Any) -> None:
        """A worker group got this placement group."""
        self.groups.append(group)

    def placements(self) -> list[Any]:
        """The placement groups since the last call."""
        groups, self.groups = self.groups, []
        return groups


class Link:
    """A worker's end of the mailbox; a thread pushes, so that the training loop never waits for the driver."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox, self.stopping = mailbox, False
        self._events: list[dict[str, Any]] = []
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="events", daemon=True)
        self._thread.start()

    def emit(self, event: dict[str, Any]) -> None:
        """Queues an event."""
        with self._lock:
            self._events.append({"time": time.time(), **event})

    def close(self) -> None:
        """Sends what is left."""
        self._closed.set()
        self._thread.join(5)

    def _work(self) -> None:
        while not self._closed.wait(PUSH_S):
            self._push()
        self._push()

    def _push(self) -> None:
        with self._lock:
            events, self._events = self._events, []
        with contextlib.suppress(ray.exceptions.RayError):
            self.stopping = ray.get(self.mailbox.push.remote(events), timeout=10)


class _Warnings(logging.Handler):
    """Log records of raychain become events."""

    def __init__(self, link: Link) -> None:
        super().__init__(logging.WARNING)
        self.link = link

    def emit(self, record: logging.LogRecord) -> None:
        self.link.emit({"event": "warning", "message": record.getMessage()})


def train_chain(config: dict[str, Any]) -> bool:
    """Ray Train's worker function: {`task`: reference to a ChainTask, `mailbox`: actor, `micro_batch`: {stage: pairs or
    None}, `until`: stage}. Returns whether the stages up to that one are finished.
    """
    import ray.train.torch
    import torch

    from raychain.backend_ray.preloading import preloading
    from raychain.core.dist import rank
    from raychain.data.content import ChangedError
    from raychain.training.measuring import Beside
    from raychain.training.stage import ChainWorker

    task: ChainTask = ray.get(config["task"])
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(task.threads)
    gpu = task.experiment.compute.gpus_per_worker > 0
    device = ray.train.torch.get_device() if gpu else torch.device("cpu")
    link = Link(config["mailbox"])
    handler = _Warnings(link)
    logging.getLogger("raychain").addHandler(handler)
    link.emit({"event": "worker", "rank": rank(), "node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()})
    worker = ChainWorker(
        task,
        device,
        link.emit,
        lambda: link.stopping,
        preloading=task.experiment.preload.cpus != 0,
        micro_batches=config["micro_batch"],
        until=config["until"],
        beside=True,
    )
    try:
        with preloading(task, worker, link.emit) as helper:
            if worker.rank == 0 and task.suite.evaluations:
                worker.beside = Beside(_place(task, worker, helper), worker.measured_beside)
            return worker.run()
    except (FloatingPointError, InputError, ChangedError) as error:
        known = {"stage": error.stage, "step": error.step} if isinstance(error, Diverged) else {}
        link.emit({"event": "failure", "kind": "fatal", "message": str(error), **known})
        raise
    except torch.OutOfMemoryError as error:
        message = str(error).strip().splitlines()[0]
        link.emit({"event": "failure", "kind": "memory", "message": message, **worker.holding()})
        raise
    finally:
        logging.getLogger("raychain").removeHandler(handler)
        link.close()


def _place(task: ChainTask, worker: ChainWorker, helper: PreloadLink | None) -> OnRay:
    """Where rank 0 has models measured beside the training."""
    from raychain.backend_ray.measuring import OnRay
    from raychain.training.measuring import InThread

    if worker.device.type == "cpu":
        return OnRay(task, helper=helper.actor if helper else None)
    return OnRay(task, thread=InThread(worker.paradigm, worker.cache, worker.device, worker.settled.is_set))
