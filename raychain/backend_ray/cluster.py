"""What the Ray cluster has: room for workers, nodes that are leaving, placement groups that were left behind."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray._private import state
from ray._raylet import PlacementGroupID
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.util.placement_group import PlacementGroup, remove_placement_group

Resources = Mapping[str, float]


def leaving() -> set[str]:
    """Ids of the nodes that are being drained, as a spot node is when its provider takes it back."""
    return set(state.state.get_draining_nodes())


def room(worker: Resources) -> int:
    """How many more workers of these resources the free resources hold now."""
    away = leaving()
    return sum(_fit(free, worker) for node, free in state.available_resources_per_node().items() if node not in away)


def free_node(worker: Resources) -> str | None:
    """A node whose free resources hold a worker now."""
    away = leaving()
    free = state.available_resources_per_node().items()
    return next((node for node, left in free if node not in away and _fit(left, worker)), None)


def capacity(worker: Resources) -> int:
    """How many workers the cluster would hold if nothing else ran on it."""
    away = leaving()
    return sum(_fit(total, worker) for node, total in state.total_resources_per_node().items() if node not in away)


def launching() -> bool:
    """Whether an autoscaler is bringing nodes. What it could bring, Ray 2.60 does not tell."""
    with contextlib.suppress(ray.exceptions.RayError, RuntimeError):
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return bool(status.pending_launches or status.pending_nodes)
    return False


def describe(worker: Resources) -> str:
    """What the nodes have in total of the resources a worker needs, for messages."""
    nodes = [
        " ".join(f"{total.get(name, 0):g} {name}" for name in worker)
        for total in state.total_resources_per_node().values()
    ]
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''} ({'; '.join(nodes)})" if nodes else "no nodes"


class Demand:
    """Asks the cluster's autoscaler, if there is one, for workers, beside what others ask for, until `close`.

    Through the coordinator of Ray's own libraries: `ray.autoscaler.sdk.request_resources` alone would overwrite theirs.
    """

    def __init__(self, worker: Resources) -> None:
        self._config = ScalingConfig(num_workers=1, use_gpu=worker.get("GPU", 0) > 0, resources_per_worker=dict(worker))
        self._client = TrainAutoscalingCoordinatorClient(f"raychain-{uuid.uuid4().hex[:8]}")
        self._workers = 0

    def want(self, workers: int) -> None:
        """So many workers; call it again and again, as a request expires after three minutes."""
        if workers == 0:
            self.close()
        elif workers == self._workers:
            self._client.maybe_send_resource_request(self._config, workers)
        else:
            self._client.send_resource_request(self._config, workers)
        self._workers = workers

    def close(self) -> None:
        """Wants nothing any more."""
        if self._workers:
            self._client.cancel_resource_request()
        self._workers = 0


class LeftBehind(WorkerGroupCallback):
    """Runs in Ray Train's controller and tells `mailbox` the placement group of each worker group.

    Where a worker dies in its first moments Ray 2.60 gives up without removing it, and its resources stay taken.
    """

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox

    def after_worker_group_start(self, worker_group: Any) -> None:
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        ray.get(self.mailbox.placed.remote(group.id.hex()))


def remove(groups: Iterable[str]) -> None:
    """Removes placement groups by id; those that are gone already are passed over."""
    for group in groups:
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def _fit(free: Resources, worker: Resources) -> int:
    return int(min(free.get(name, 0.0) // amount for name, amount in worker.items()))
