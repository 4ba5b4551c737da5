"""Worker groups on Ray Train, one after the other, until the chain is complete.

One group carries all stages that are left and want the same number of workers. It ends early when a worker or node is
lost, when a node it runs on is being drained, and when nodes came that allow more workers; the driver then starts the
next one on what there is, from the last checkpoint. Ray Train could choose and change the number of workers itself
(`num_workers=(min, max)`), but counts nodes that are gone or draining for up to 20 s, waits a minute for them, and ends
a group that is to grow without telling it, so that the steps since its last checkpoint are lost. Here a group that is
to grow or to leave a node saves first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from raychain.backend_ray import cluster
from raychain.backend_ray.failures import failure_of, is_loss
from raychain.backend_ray.group import Workers
from raychain.errors import RunFailed
from raychain.events import (
    Failed,
    Listener,
    Listeners,
    OutOfMemory,
    Reason,
    Restarted,
    Saved,
    StageEnded,
    Stopped,
    Warned,
    WorkerStarted,
)
from raychain.runs.policy import FailurePolicy, MicroBatches, slower
from raychain.training.task import ChainTask, worker_cpus
from raychain.unexpected import keep

POLL_S = 0.2
WATCH_S = 1.0
"""How often the nodes are looked at."""
SETTLE_S = 1.5
"""How long to wait for more room than the fewest workers need before starting with what there is. What is free may be
known a second late."""
MISSING_S = 45.0
"""How long resources that the cluster does not have may be missing at the start of a run."""
REMIND_S = 60.0
GROW_AFTER_S = 30.0
"""A group trains at least this long before it makes way for a larger one."""


@dataclass
class Attempt:
    """One worker group, from `fit` to its end."""

    workers: int
    until: int
    """Its last stage."""
    began: float = field(default_factory=time.time)
    nodes: set[str] = field(default_factory=set)
    leave: str | None = None
    """Why it was asked to save and return."""
    saved: bool = False
    """It has saved and is about to return."""
    complete: bool = False
    error: BaseException | None = None


class Groups(Listener):
    """Runs worker groups for a chain, and hands their events to `listeners` once it has heard of them itself."""

    def __init__(self, task: ChainTask, listeners: Sequence[Listener], done: set[int], *, verbose: bool) -> None:
        self.task = task
        self.done = done
        """Stages, by index, that are finished."""
        self.listeners = Listeners([self, *listeners])
        compute = task.experiment.compute
        self.worker: dict[str, float] = {"CPU": worker_cpus(task.experiment)}
        if compute.gpus_per_worker:
            self.worker["GPU"] = compute.gpus_per_worker
        self.policy = FailurePolicy(compute.max_failures)
        self.micro = MicroBatches(task.experiment.train.micro_batch)
        self.demand = cluster.Demand(self.worker)
        self.attempt: Attempt | None = None
        self.stopping = False
        self._fatal: Failed | None = None
        self._memory: OutOfMemory | None = None
        self.backend = Workers(task, self.worker, verbose=verbose)

    @property
    def until(self) -> int:
        """The last stage of the next group."""
        last = first = self._stage
        while last + 1 < len(self.task.stages) and self._workers(last + 1) == self._workers(first):
            last += 1
        return last

    @property
    def fewest(self) -> int:
        """Workers without which the next stage does not start."""
        return self._workers(self._stage)[0]

    @property
    def most(self) -> int:
        """Workers that the next stage makes use of."""
        return self._workers(self._stage)[1]

    @property
    def _stage(self) -> int:
        """The first that is left; the last where none is, as it may have to be measured again."""
        return next((s.index for s in self.task.stages if s.index not in self.done), len(self.task.stages) - 1)

    def _workers(self, stage: int) -> tuple[int, int]:
        return self.task.experiment.workers(stage)

    def stop(self) -> None:
        """Has the workers save and return; `run` then returns False. It may be called by a handler of signals."""
        self.stopping = True

    def close(self) -> None:
        """Ends what belongs to the chain on Ray."""
        self.backend.close()

    def run(self, spoilt: Callable[[], bool]) -> bool:
        """Trains until the chain is complete (True), or until `stop` or `spoilt` ended it.

        Raises RunFailed when attempts fail `compute.max_failures` times in a row, when an error would only come again,
        or when the cluster cannot hold the fewest workers.
        """
        try:
            return self._run(spoilt)
        finally:
            self.demand.close()

    def _run(self, spoilt: Callable[[], bool]) -> bool:
        first = True
        while (workers := self._room(first)) and not self.stopping:
            self.attempt = attempt = Attempt(workers, self.until)
            self._execute(attempt, spoilt)
            self.done |= set(range(attempt.until + 1)) if attempt.complete else set()
            first = attempt.complete
            if attempt.complete and attempt.until + 1 == len(self.task.stages):
                return True
            if spoilt() or (self.stopping and self._fatal is None):
                return False
            if attempt.error is not None:
                self._after_failure(attempt.error)
        return False

    def _room(self, first: bool) -> int:
        """The workers of the next group, once there is room for the fewest; 0 when the run is to stop."""
        began = time.monotonic()
        told = began - REMIND_S + SETTLE_S
        coming = False
        while not self.stopping:
            waited, room = time.monotonic() - began, min(cluster.room(self.worker), self.most)
            if room == self.most or (room >= self.fewest and waited >= SETTLE_S):
                return room
            self.demand.want(self.most)
            coming = coming or (room < self.fewest and cluster.launching())
            possible = cluster.capacity(self.worker)
            missing = (
                f"{self.fewest} worker{'s' if self.fewest > 1 else ''} of {self._needs()} each cannot be placed: "
                f"the cluster holds {possible}; it has {cluster.describe(self.worker)}"
            )
            if first and waited >= MISSING_S and possible < self.fewest and not coming:
                raise RunFailed(f"{missing}. Lower compute.workers or compute.cpus_per_worker, or add nodes.")
            if room < self.fewest and time.monotonic() - told >= REMIND_S:
                told = time.monotonic()
                self.listeners.dispatch(Warned(f"waiting for resources: {missing}"))
            time.sleep(POLL_S)
        return 0

    def _needs(self) -> str:
        return " and ".join(f"{amount:g} {name}" for name, amount in self.worker.items())

    def _execute(self, attempt: Attempt, spoilt: Callable[[], bool]) -> None:
        """Runs one group to its end, whatever that is."""
        micro = {stage.index: self.micro.of(stage.index) for stage in self.task.stages}
        group = self.backend.start(attempt.workers, attempt.until, micro)
        looked = time.monotonic()
        try:
            while group.is_alive() and not (self.stopping and attempt.saved):
                group.join(POLL_S)
                self._drain()
                if self.stopping or spoilt():
                    self.backend.request_stop()  # again: the wish may have crossed the start
                elif time.monotonic() - looked >= WATCH_S:
                    looked = time.monotonic()
                    self._watch(attempt)
            self._drain()
            attempt.complete, attempt.error = group.complete, group.error
        finally:
            group.tidy()

    def _watch(self, attempt: Attempt) -> None:
        """Asks the group to save and return where its nodes leave, or where more workers would fit."""
        most = self._workers(attempt.until)[1]
        self.demand.want(most - attempt.workers, attempt.workers)
        if attempt.leave or not attempt.nodes:
            return
        away = attempt.nodes & cluster.leaving()
        if away:
            self._ask(attempt, "drain", f"{len(away)} of its nodes will be taken away")
        elif attempt.workers < most and time.time() - attempt.began >= GROW_AFTER_S:
            more = min(most - attempt.workers, cluster.room(self.worker))
            if more:
                self._ask(attempt, "grow", f"there is room for {attempt.workers + more} workers")

    def _ask(self, attempt: Attempt, reason: Reason, message: str) -> None:
        attempt.leave = reason
        self.backend.request_stop()
        self._tell_restart(reason, f"{message}: the workers save, a new group goes on")

    def _after_failure(self, error: BaseException) -> None:
        """Waits as long as the policy says, or raises RunFailed."""
        if self._fatal is not None:
            stage, step = self._fatal.diverged or (0, 0)
            overrides = slower(self.task.stages[stage], step) if self._fatal.diverged else ()
            raise RunFailed(self._fatal.message, overrides) from error
        if self._memory is not None:
            seen, self._memory = self._memory, None
            smaller = self.micro.too_large(seen.stage, seen.micro_batch)
            if smaller is None:
                raise RunFailed(f"{seen.message} Lower train.micro_batch or train.global_batch.") from error
            held = f"{seen.micro_batch} {self.task.paradigm.samples}"
            self._tell_restart("memory", f"too little memory for {held} at once: trying {smaller}")
            return
        why, pause = failure_of(error), self.policy.failed()
        if pause is None:
            times = f" ({self.policy.limit + 1} times in a row)" if self.policy.limit else ""
            kept = None if is_loss(error) else keep(error)
            raise RunFailed(f"{why}{times}{f' (traceback: {kept})' if kept else ''}") from error
        count = f"{self.policy.failures} of {self.policy.limit} in a row"
        self._tell_restart("failure", f"{why}: starting again from the last checkpoint ({count})")
        until = time.monotonic() + pause
        while time.monotonic() < until and not self.stopping:
            time.sleep(POLL_S)

    def _tell_restart(self, reason: Reason, message: str) -> None:
        workers = self.attempt.workers if self.attempt else 0
        self.listeners.dispatch(Restarted(reason, workers, message))

    def worker_started(self, event: WorkerStarted) -> None:
        """Notes the group's nodes."""
        if self.attempt:
            self.attempt.nodes.add(event.node)

    def saved(self, event: Saved) -> None:
        """Notes that training goes forward."""
        self.policy.progressed(event.stage, event.step)

    def stopped(self, event: Stopped) -> None:  # noqa: ARG002 - at whatever step
        """Notes that the group is about to return."""
        if self.attempt:
            self.attempt.saved = True

    def stage_ended(self, event: StageEnded) -> None:
        """Notes that the stage is finished."""
        self.policy.progressed(event.stage + 1, 0)
        self.done.add(event.stage)

    def out_of_memory(self, event: OutOfMemory) -> None:
        """Notes that the next group needs smaller micro-batches."""
        self._memory = event

    def failed(self, event: Failed) -> None:
        """Notes the first error that would only come again."""
        self._fatal = self._fatal or event

    def _drain(self) -> None:
        for event in self.backend.events():
            self.listeners.dispatch(event)
