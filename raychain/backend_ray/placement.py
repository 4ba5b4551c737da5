"""Placement groups that Ray Train leaves behind.

Where a worker dies in its first moments Ray Train gives up without removing its group's placement group, and the
resources stay taken. Workers tell theirs as soon as they have started.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import BackendConfig
from ray.train.torch import TorchConfig
from ray.util import get_current_placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup


@dataclass
class Placed(TorchConfig):
    """Ray Train's process group of torch, before which `mailbox` is told the placement group of the workers."""

    mailbox: Any = None

    @property
    def backend_cls(self) -> type:
        """The class whose `on_start` Ray Train's controller calls when the workers' processes are there."""
        torch_backend: Any = super().backend_cls

        class Telling(torch_backend):
            def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
                group = worker_group.execute_single(0, get_current_placement_group)
                ray.get(backend_config.mailbox.placed.remote(group))  # type: ignore[attr-defined]
                super().on_start(worker_group, backend_config)

        return Telling


def remove(groups: Iterable[PlacementGroup]) -> None:
    """Removes placement groups; those that are gone already are passed over."""
    for group in groups:
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            remove_placement_group(group)
