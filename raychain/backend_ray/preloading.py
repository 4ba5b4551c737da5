"""A helper process a node: a Ray actor beside the workers, which decodes ahead, told by one of them where the training
loop is, and measures finished models.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raychain.events import Event, Span, Warned

if TYPE_CHECKING:
    from raychain.training.stage import ChainWorker
    from raychain.training.task import ChainTask

REPORT_S = 0.5


class PreloadActor:
    """A node's Preloader and Measurer in a process of their own, which runs when no other wants the core.

    That begins with its imports, for which a starting worker would wait otherwise: `task` is a reference in a list, as
    Ray would import what the task is made of before this is called. `ranks` are the node's.
    """

    def __init__(self, task: list[ray.ObjectRef], ranks: Sequence[int], world: int) -> None:
        run_when_idle()
        from raychain.backend_ray.measuring import Measurer
        from raychain.data.cache import ShardCache
        from raychain.data.preload import Preloader, Ranks, Source

        chain: ChainTask = ray.get(task[0])
        self.measurer = Measurer(chain)
        self.preloader = None
        preload = chain.experiment.preload
        if preload.cpus == 0:
            return
        cpus = preload.cpus if preload.cpus is not None else max(1.0, (os.cpu_count() or 1) / 4)
        sources = [Source(stage.feed, chain.experiment.train.global_batch) for stage in chain.stages]
        self.preloader = Preloader(sources, ShardCache(preload.cache, preload.budget), cpus, Ranks(ranks, world))

    def report(self, stage: int, step: int, waiting: float) -> list[Span]:
        """See Preloader.report."""
        run_when_idle()
        return self.preloader.report(stage, step, waiting) if self.preloader else []

    def measure(self, stage: int, weights: list[ray.ObjectRef], name: str) -> dict[str, float]:
        """See Measurer.measure."""
        run_when_idle()
        return self.measurer.measure(stage, weights, name)


def run_when_idle() -> None:
    """Lowest priority for this thread and those it starts. Ray's workers themselves run at nice 15, next to which 19
    would be no difference; Linux has a class below.
    """
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)


class PreloadLink:
    """Starts this node's helper process and keeps its preloader informed from a thread of the worker.

    If the actor is lost, the loaders fetch for themselves.
    """

    def __init__(self, task: ChainTask, worker: ChainWorker, emit: Callable[[Event], None]) -> None:
        from raychain.core.dist import world_size  # torch, which the helper imports at its own priority

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(num_cpus=0)(PreloadActor)
        # two at once: a report does not wait for a measurement
        self.actor = actor.options(scheduling_strategy=here, max_concurrency=2).remote(
            [ray.put(task)], worker.node, world_size()
        )
        self._worker, self._emit = worker, emit
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="preload-link", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the actor."""
        self._closed.set()
        self._thread.join(REPORT_S)
        ray.kill(self.actor)

    def _work(self) -> None:
        last: tuple[int, float, float] = (-1, time.monotonic(), 0.0)
        while not self._closed.wait(REPORT_S):
            position = self._worker.position
            if position is None:
                continue
            (stage, step, waited), now = position, time.monotonic()
            fraction = (waited - last[2]) / (now - last[1]) if stage == last[0] else 0.0
            last = (stage, now, waited)
            try:
                spans = ray.get(self.actor.report.remote(stage, step, fraction))
            except ray.exceptions.RayError:
                if not self._closed.is_set():
                    self._emit(Warned("a preloader died; the loaders fetch for themselves"))
                self._worker.preloading = False
                self._worker.hurry.set()
                return
            for span in spans:
                self._emit(span)


def preloading(
    task: ChainTask, worker: ChainWorker, emit: Callable[[Event], None]
) -> contextlib.AbstractContextManager[PreloadLink | None]:
    """The link of the one worker of each node that keeps the node's helper; a null context for the others."""
    measures = worker.rank == 0 and worker.device.type == "cpu" and bool(task.suite.evaluations)
    if worker.rank != worker.node[0] or not (task.experiment.preload.cpus != 0 or measures):
        return contextlib.nullcontext()
    return contextlib.closing(PreloadLink(task, worker, emit))
