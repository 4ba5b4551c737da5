"""A process a node that decodes ahead: a Ray actor beside the workers. One of them tells it where the loop is."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raychain.core.priority import run_when_idle
from raychain.events import Event, Span, Warned

if TYPE_CHECKING:
    from raychain.training.stage import ChainWorker
    from raychain.training.task import ChainTask

REPORT_S = 0.5


class PreloadActor:
    """A node's Preloader in a process of its own, which runs when no other wants the core.

    That begins with its imports, for which a starting worker would wait otherwise: `task` is a reference in a list, as
    Ray would import what the task is made of before this is called. `ranks` are the node's.
    """

    def __init__(self, task: list[ray.ObjectRef], ranks: Sequence[int], world: int) -> None:
        run_when_idle()
        from raychain.data.cache import ShardCache
        from raychain.data.preload import Preloader, Ranks, Source

        chain: ChainTask = ray.get(task[0])
        preload = chain.experiment.preload
        cpus = preload.cpus if preload.cpus is not None else max(1.0, (os.cpu_count() or 1) / 4)
        sources = [Source(stage.feed, chain.experiment.train.global_batch) for stage in chain.stages]
        self.preloader = Preloader(sources, ShardCache(preload.cache, preload.budget), cpus, Ranks(ranks, world))

    def report(self, stage: int, step: int, waiting: float) -> list[Span]:
        """See Preloader.report."""
        run_when_idle()
        return self.preloader.report(stage, step, waiting)


class PreloadLink:
    """Starts this node's preloading process and keeps it informed from a thread of the worker.

    It is started with the first stage's training: what it imports would take half a core from what the worker imports
    and builds before. If the actor is lost, the loaders fetch for themselves.
    """

    def __init__(self, task: ChainTask, worker: ChainWorker, emit: Callable[[Event], None]) -> None:
        self._actor: Any = None
        self._task, self._worker, self._emit = task, worker, emit
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="preload-link", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the actor."""
        self._closed.set()
        self._thread.join(REPORT_S)
        if self._actor is not None:
            ray.kill(self._actor)

    def _started(self) -> Any:
        from raychain.core.dist import world_size  # torch, which the helper imports at its own priority

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(num_cpus=0)(PreloadActor)
        return actor.options(scheduling_strategy=here).remote([ray.put(self._task)], self._worker.node, world_size())

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
                self._actor = self._actor or self._started()
                spans = ray.get(self._actor.report.remote(stage, step, fraction))
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
    """The link of the one worker of each node that has the node's shards preloaded; a null context for the others."""
    if worker.rank != worker.node[0] or task.experiment.preload.cpus == 0:
        return contextlib.nullcontext()
    return contextlib.closing(PreloadLink(task, worker, emit))
