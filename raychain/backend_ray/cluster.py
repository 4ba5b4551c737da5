"""What the Ray cluster has: room for workers, nodes that are leaving, nodes that are coming."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from raychain.backend_ray import internals

if TYPE_CHECKING:
    from ray.autoscaler.v2.schema import ClusterStatus

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Node:
    """A living node."""

    id: str
    total: Resources
    free: Resources
    leaving: bool
    """It is being drained, as a spot node is when its provider takes it back."""


def nodes() -> list[Node]:
    """The living nodes. What is free of them is up to a second old.

    Where Ray does not tell the state of each, no node is leaving and everything of each is free.
    """
    status = _status()
    if status is None:
        alive = [node for node in ray.nodes() if node["Alive"]]
        return [Node(node["NodeID"], node["Resources"], node["Resources"], False) for node in alive]
    return [
        Node(str(node.node_id), node.total_resources(), node.available_resources(), node.node_status == "DRAINING")
        for node in (*status.active_nodes, *status.idle_nodes)
    ]


def leaving() -> set[str]:
    """Ids of the nodes that are being drained."""
    return {node.id for node in nodes() if node.leaving}


def room(worker: Resources) -> int:
    """How many more workers of these resources the free resources hold now."""
    now = _fit(ray.available_resources(), worker)  # of all nodes together, but not a second old
    return min(now, sum(_fit(node.free, worker) for node in nodes() if not node.leaving))


def free_node(worker: Resources) -> str | None:
    """A node whose free resources hold a worker now."""
    return next((node.id for node in nodes() if not node.leaving and _fit(node.free, worker)), None)


def capacity(worker: Resources) -> int:
    """How many workers the cluster would hold if nothing else ran on it."""
    return sum(_fit(node.total, worker) for node in nodes() if not node.leaving)


def launching() -> bool:
    """Whether an autoscaler is bringing nodes. What it could bring, Ray does not tell."""
    status = _status()
    return status is not None and bool(status.pending_launches or status.pending_nodes)


def describe(worker: Resources) -> str:
    """What the nodes have in total of the resources a worker needs, for messages."""
    has = [" ".join(f"{node.total.get(name, 0):g} {name}" for name in worker) for node in nodes()]
    return f"{len(has)} node{'s' if len(has) != 1 else ''} ({'; '.join(has)})" if has else "no nodes"


class Demand:
    """Asks the cluster's autoscaler, if there is one, for workers, beside what others ask for, until `close`."""

    def __init__(self, worker: Resources) -> None:
        self._requests = internals.requests(f"raychain-{uuid.uuid4().hex[:8]}", worker)
        self._wanted = (0, 0)

    def want(self, workers: int, running: int = 0) -> None:
        """Asks for so many beside those `running`; to be called again and again, as a request expires after minutes."""
        if workers == 0:
            self.close()
            return
        self._requests.ask(workers, running, again=(workers, running) == self._wanted)
        self._wanted = (workers, running)

    def close(self) -> None:
        """Takes the request back."""
        if self._wanted[0]:
            self._requests.cancel()
        self._wanted = (0, 0)


def _status() -> ClusterStatus | None:
    """What `ray status` would print; None where this version of Ray has it elsewhere, or the head does not answer."""
    try:
        from ray.autoscaler.v2.sdk import get_cluster_status

        return get_cluster_status(ray.get_runtime_context().gcs_address)
    except (ImportError, AttributeError) as error:
        internals.missing("the state of each node, so nodes that are drained are lost without notice", error)
    except (RuntimeError, ray.exceptions.RayError):
        pass
    return None


def _fit(free: Resources, worker: Resources) -> int:
    return int(min(free.get(name, 0.0) // amount for name, amount in worker.items()))
