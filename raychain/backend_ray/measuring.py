"""Where models are measured while training goes on: on a node with room for one more worker, or beside rank 0's worker.

What is beside it is a thread of the worker (`training.measuring.InThread`). Measuring takes resources of its own from
so many samples on that it is worth a process's start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:
    from torch import nn

    from raychain.evaluators.suite import Evaluation
    from raychain.training.measuring import InThread
    from raychain.training.task import ChainTask, StageTask

log = logging.getLogger("raychain.training")

APART_FROM = 10_000
"""Held-out samples from which measuring gets a process with a worker's resources, where a node has them free."""
POLL_S = 0.2


class Apart:
    """An actor that measures the stages of a chain with resources of its own; `task` is a reference in a list, see
    `PreloadActor`. It keeps the last model, which may be asked about several times.
    """

    def __init__(self, task: list[ray.ObjectRef]) -> None:
        import torch

        self._chain: ChainTask = ray.get(task[0])
        self._held: tuple[str, nn.Module | None] = "", None
        self._device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")

    def measure(self, stage: int, weights: list[ray.ObjectRef], name: str) -> dict[str, float]:
        """The metrics of the evaluator `name`; `weights` is a reference to a state dict, in a list."""
        import torch

        from raychain.data.cache import ShardCache
        from raychain.evaluators.ranks import World
        from raychain.training.measuring import measured

        torch.set_num_threads(self._chain.threads)
        task, preload = self._chain.stages[stage], self._chain.experiment.preload
        known, model = self._held
        if model is None or known != weights[0].hex():
            model = self._chain.paradigm.build(task.config, size=task.size, seed=0)
            model.load_state_dict(ray.get(weights[0]))
            model = model.to(self._device)
            self._held = weights[0].hex(), model
        evaluation = next(found for found in self._chain.suite.evaluations if found.name == name)
        cache = ShardCache(preload.cache, preload.budget)
        paradigm = self._chain.paradigm
        return measured(paradigm, task, model, [evaluation], cache, self._device, World())[evaluation.digest]


class Copy(NamedTuple):
    """A model to be measured: by an actor that is there for it alone, or in the thread (no actor)."""

    actor: Any
    weights: Any
    """A reference to the state dict in the object store, or what the thread has copied."""


class OnRay:
    """The places there are for rank 0's worker, as one `Place`: an actor where there is room for one, else a thread of
    this process.
    """

    def __init__(self, chain: ChainTask, thread: InThread) -> None:
        self._chain, self._thread = chain, thread
        self._task = ray.put(chain) if chain.suite.samples >= APART_FROM else None
        self._apart = 0

    @property
    def patient(self) -> bool:
        """See Place: what has resources of its own is as quick as the workers."""
        return self._thread.patient or self._apart > 0

    @property
    def lost(self) -> bool:
        """See Place."""
        return self._thread.lost

    def copy(self, stage: StageTask, model: nn.Module) -> Copy | None:
        """See Place."""
        apart = self._start_apart()
        if apart is None:
            held = self._thread.copy(stage, model)
            return Copy(None, held) if held is not None else None
        weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
        self._apart += 1
        return Copy(apart, ray.put(weights))

    def measure(
        self, stage: StageTask, model: Copy, evaluation: Evaluation, given_up: Callable[[], bool]
    ) -> dict[str, float] | None:
        """See Place."""
        if model.actor is None:
            return self._thread.measure(stage, model.weights, evaluation, given_up)
        asked = model.actor.measure.remote(stage.index, [model.weights], evaluation.name)
        try:
            while not ray.wait([asked], timeout=POLL_S)[0]:
                if given_up():
                    return None
            found: dict[str, float] = ray.get(asked)
        except ray.exceptions.RayError as error:
            log.warning("%s will be measured again: %s", stage.model, str(error).strip().splitlines()[-1])
            return None
        return found

    def release(self, model: Copy) -> None:
        """See Place."""
        if model.actor is not None:
            self._apart -= 1
            ray.kill(model.actor)

    def _start_apart(self) -> Any:
        """An actor with a worker's resources where there is room; None where there is none or it would not pay."""
        if self._task is None:
            return None
        from raychain.backend_ray import cluster  # a second of imports, which most runs need not

        own = _resources()
        node = cluster.free_node(own)
        if node is None:
            return None
        place = NodeAffinitySchedulingStrategy(node, soft=False, _fail_on_unavailable=True)
        actor: Any = ray.remote(Apart)
        resources = {"num_cpus": own.get("CPU", 0), "num_gpus": own.get("GPU", 0)}
        return actor.options(**resources, scheduling_strategy=place).remote([self._task])


def _resources() -> dict[str, float]:
    found: dict[str, float] = ray.get_runtime_context().get_assigned_resources()
    return {name: found[name] for name in ("CPU", "GPU") if found.get(name)}
