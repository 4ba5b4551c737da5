"""Ray Train's controllers of a run's worker groups, one after the other in one process."""

from __future__ import annotations

from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Controllers:
    """The actor. With one of its own, as Ray Train has it, each group would wait four seconds for an import of torch
    before its workers can start.
    """

    async def run(self, arguments: dict[str, Any]) -> Any:
        """The result of a controller of these arguments."""
        controller = TrainController(**arguments)
        await controller.run()
        return controller.get_result()


def start_controllers(where: NodeAffinitySchedulingStrategy) -> Any:
    """The actor's handle; returns at once."""
    settings = {"env_vars": get_env_vars_to_propagate() | {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}}
    actor: Any = ray.remote(num_cpus=0)(Controllers)
    return actor.options(scheduling_strategy=where, runtime_env=settings).remote()


class Trainer(TorchTrainer):
    """Ray Train's, with its controller in `controllers`, and without two processes a group that start with it and have
    nothing to do: Ray Data's manager of datasets, and the cleaner that waits for the controller's death.
    """

    def __init__(self, controllers: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._controllers = controllers

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return ray.get(self._controllers.run.remote(arguments))

    def _create_default_callbacks(self) -> list[Any]:
        defaults = super()._create_default_callbacks()  # type: ignore[misc]
        return [c for c in defaults if not isinstance(c, PlacementGroupCleanerCallback | DatasetsCallback)]
