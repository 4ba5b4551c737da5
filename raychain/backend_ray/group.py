"""Worker groups on Ray Train: started, listened to, asked to save, and waited for."""

from __future__ import annotations

import contextlib
import pickle
import threading
import uuid
from collections.abc import Mapping
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raychain.backend_ray import internals, process_group
from raychain.backend_ray.cluster import Resources
from raychain.backend_ray.environment import environment
from raychain.backend_ray.worker import Mailbox, train_chain
from raychain.core.storage import Folder
from raychain.events import Event
from raychain.training.task import ChainTask

SETTINGS = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Ray Train's own 60 s and 2 s would be most of the time a lost node costs; `Groups` watches for drained nodes."""


class Workers:
    """Starts the worker groups of one chain, one after the other, and brings their events."""

    def __init__(self, task: ChainTask, worker: Resources, *, verbose: bool) -> None:
        self.task, self.worker, self.verbose = task, dict(worker), verbose
        self._begun = False
        self._held = contextlib.ExitStack()
        self._held.enter_context(environment(SETTINGS))
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.mailbox: Any = ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote()

    def start(self, count: int, until: int, micro_batches: Mapping[int, int | None]) -> WorkerGroup:
        """A group of `count` workers, which train the chain up to the stage `until`."""
        if self._begun:  # the first does not wait for the mailbox's process
            ray.get(self.mailbox.resume.remote())
        self._begun = True
        return WorkerGroup(self, count, until, micro_batches)

    def request_stop(self) -> None:
        """Asks the workers to save and return."""
        self.mailbox.request_stop.remote()

    def events(self) -> list[Event]:
        """The events since the last call."""
        with contextlib.suppress(ray.exceptions.RayError):
            pushed: list[bytes] = ray.get(self.mailbox.drain.remote(), timeout=30)
            return [event for events in pushed for event in pickle.loads(events)]  # noqa: S301 - of our own workers
        return []

    def close(self) -> None:
        """Ends the mailbox's process; a search runs many chains on one connection to Ray."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self.mailbox)
        self._held.close()


class WorkerGroup(threading.Thread):
    """One group, which has started to train. The thread lives until the workers are gone."""

    def __init__(self, workers: Workers, count: int, until: int, micro_batches: Mapping[int, int | None]) -> None:
        super().__init__(name="fit", daemon=True)
        self.complete = False
        """All stages up to `until` are finished."""
        self.error: BaseException | None = None
        """Why the group failed."""
        self._mailbox, self._storage = workers.mailbox, Folder(workers.task.out)
        self._name = f"ray-{uuid.uuid4().hex[:8]}"
        task, gpu = ray.put(workers.task), workers.worker.get("GPU", 0) > 0  # the controller need not import its parts
        settings = {"task": task, "mailbox": self._mailbox, "micro_batch": dict(micro_batches), "until": until}
        self._trainer = internals.lean(TorchTrainer)(
            train_chain,  # what it returns is `return_value` below
            train_loop_config=settings,
            scaling_config=ScalingConfig(num_workers=count, use_gpu=gpu, resources_per_worker=workers.worker),
            torch_config=process_group.ProcessGroup("nccl" if gpu else "gloo", self._mailbox),
            run_config=RunConfig(
                name=self._name,
                storage_path=self._storage.path,
                storage_filesystem=None if self._storage.local else self._storage.fs,
                failure_config=FailureConfig(  # type: ignore[call-arg]
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
                logging_config=LoggingConfig(log_level="INFO" if workers.verbose else "ERROR"),
            ),
        )
        self.start()

    def run(self) -> None:
        """Waits for Ray Train; called by the thread."""
        try:
            self.complete = bool(self._trainer.fit().return_value)
        except BaseException as error:  # handled by the thread that waits
            self.error = error

    def tidy(self) -> None:
        """Frees what Ray Train leaves behind: the group's resources, if it failed, and files in the run folder."""
        with contextlib.suppress(Exception):
            process_group.remove(ray.get(self._mailbox.placements.remote(), timeout=10))
        with contextlib.suppress(OSError):  # a few files; the storage may be away
            self._storage.delete(self._name)
