"""The Ray Train worker: a process group is up when `train_chain` is called on every worker.

Ray Train's controller and the mailbox import this module too, so what only the training needs is imported there: torch
and the models take seconds, which every start of a group would pay twice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
import warnings
from typing import TYPE_CHECKING, Any, TypedDict

import ray

from raychain.errors import Diverged, InputError
from raychain.events import Event, Failed, OutOfMemory, Warned, WorkerStarted

if TYPE_CHECKING:
    from raychain.training.task import ChainTask

PUSH_S = 0.2


class Mailbox:
    """An actor between workers and driver: events one way, the wish to stop the other way."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.groups: list[Any] = []
        self.stop = False

    def push(self, events: bytes) -> bool:
        """Takes pickled events, which are not looked at here; returns whether the driver wants the run stopped."""
        if events:
            self.events.append(events)
        return self.stop

    def drain(self) -> list[bytes]:
        """What was pushed since the last call."""
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
        self._events: list[Event] = []
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="events", daemon=True)
        self._thread.start()

    def emit(self, event: Event) -> None:
        """Queues an event."""
        with self._lock:
            self._events.append(event)

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
            self.stopping = ray.get(self.mailbox.push.remote(pickle.dumps(events) if events else b""), timeout=10)


class _Warnings(logging.Handler):
    """Log records of raychain become events."""

    def __init__(self, link: Link) -> None:
        super().__init__(logging.WARNING)
        self.link = link

    def emit(self, record: logging.LogRecord) -> None:
        self.link.emit(Warned(record.getMessage()))


class Settings(TypedDict):
    """What Ray Train hands to every worker of a group."""

    task: ray.ObjectRef[ChainTask]
    mailbox: Any
    """The Mailbox actor."""
    micro_batch: dict[int, int | None]
    """Samples at once, of each stage by index; None: a worker's whole share."""
    until: int
    """The last stage that the group trains."""


def train_chain(config: Settings) -> bool:
    """Ray Train's worker function. Returns whether the stages up to `until` are finished."""
    import ray.train.torch
    import torch

    from raychain.backend_ray.measuring import OnRay
    from raychain.backend_ray.preloading import preloading
    from raychain.core.attention import unfused_on_cpus
    from raychain.core.dist import rank
    from raychain.data.content import ChangedError
    from raychain.training.measuring import Beside, InThread
    from raychain.training.stage import ChainWorker

    task: ChainTask = ray.get(config["task"])
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(task.threads)
    gpu = task.experiment.compute.gpus_per_worker > 0
    device = torch.device("cpu")
    if gpu:
        device = ray.train.torch.get_device()
        torch.cuda.set_device(device)  # of this thread
    link = Link(config["mailbox"])
    handler = _Warnings(link)
    logging.getLogger("raychain").addHandler(handler)
    link.emit(WorkerStarted(rank(), ray.get_runtime_context().get_node_id(), os.getpid()))
    worker = ChainWorker(
        task,
        device,
        link.emit,
        lambda: link.stopping,
        preloading=task.experiment.preload.cpus != 0,
        micro_batches=config["micro_batch"],
        until=config["until"],
        beside=True,
        node=ray.get_runtime_context().get_node_id(),
    )
    try:
        with unfused_on_cpus(device), preloading(task, worker, link.emit):  # what is measured in a thread too
            if worker.rank == 0 and task.suite.evaluations:
                thread = InThread(worker.paradigm, worker.cache, device, worker.settled.is_set)
                worker.beside = Beside(OnRay(task, thread), worker.measured_beside)
            return worker.run()
    except (FloatingPointError, InputError, ChangedError) as error:
        link.emit(Failed(str(error), (error.stage, error.step) if isinstance(error, Diverged) else None))
        raise
    except torch.OutOfMemoryError as error:
        message = str(error).strip().splitlines()[0]
        link.emit(OutOfMemory(message, *worker.holding()))
        raise
    finally:
        logging.getLogger("raychain").removeHandler(handler)
        link.close()
