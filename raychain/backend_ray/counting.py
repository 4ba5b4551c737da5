"""Shards that nobody has counted are counted on all nodes of a cluster, as Ray tasks, before its workers start."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raychain.backend_ray.address import cluster
from raychain.backend_ray.connection import joined
from raychain.data.shard import counted, counted_by

if TYPE_CHECKING:
    from raychain.data.members import Format
    from raychain.data.shard import Shard

log = logging.getLogger("raychain.data")
MOST, EACH = 64, 2
"""Shards counted at once: so many for each CPU, as they wait for storage half of the time, and all together at most."""


def count(shard: Shard, wanted: Format, hashed: bool) -> Shard:
    """See `raychain.data.shard.counted`."""
    return counted(shard, wanted, hashed)


class OverCluster:
    """An `Elsewhere`: it joins the cluster when the first shard is to be counted, and leaves it when it is closed.

    On a cluster of one node the driver counts for itself: that takes no process more.
    """

    def __init__(self, address: str | None, verbose: bool) -> None:
        self._address, self._verbose = address, verbose
        self._lock, self._stack = threading.Condition(), contextlib.ExitStack()
        self._nodes: dict[str, float] | None = None
        self._busy: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        """Shards that each node has counted."""
        self._task: Any = None

    @property
    def width(self) -> int:
        """How many threads wait for tasks, most of which do nothing before the cluster is joined."""
        return MOST

    def count(self, shard: Shard, wanted: Format, hashed: bool) -> Shard | None:
        """See Elsewhere. What fails on a node is counted by the driver, which says what is wrong."""
        node = self._take()
        if node is None:
            return None
        place = NodeAffinitySchedulingStrategy(node, soft=True)
        try:
            found: Shard = ray.get(self._task.options(scheduling_strategy=place).remote(shard, wanted, hashed))
        except Exception as error:  # a file that the node does not see, a lost node, a raychain of another version
            log.info("%s is counted by the driver: %s", shard.address, error)
            return None
        finally:
            with self._lock:
                self._busy[node] -= 1
                self._lock.notify()
        with self._lock:
            self.done[node] += 1
        return found

    def close(self) -> None:
        """Leaves the cluster, and says what it did."""
        if self.done:
            log.warning("%s shards were counted on %s nodes", f"{self.done.total():,}", len(self.done))
        self._stack.close()

    def _take(self) -> str | None:
        """The node with the most room for another task, once there is room; None where the driver is to count."""
        with self._lock:
            if self._nodes is None:
                self._nodes = self._join()
            nodes = self._nodes
            if len(nodes) < 2:
                return None

            def room(node: str) -> float:
                return 1 - self._busy[node] / (EACH * nodes[node])

            self._lock.wait_for(lambda: max(map(room, nodes)) > 0)
            node = max(nodes, key=room)
            self._busy[node] += 1
            return node

    def _join(self) -> dict[str, float]:
        """The cluster's nodes that have CPUs, and how many."""
        self._stack.enter_context(joined(self._address, self._verbose))
        self._task = ray.remote(num_cpus=0, max_retries=1)(count)
        return _nodes()


def _nodes() -> dict[str, float]:
    """The cluster's nodes that have CPUs, and how many."""
    found = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]}
    return {node: cpus for node, cpus in found.items() if cpus > 0}


@contextlib.contextmanager
def over_cluster(address: str | None, verbose: bool = False) -> Iterator[None]:
    """Surveys inside count on the cluster at `address`, at RAY_ADDRESS, or to which this process is connected."""
    if (ray.is_initialized() and len(_nodes()) < 2) or (not ray.is_initialized() and cluster(address) is None):
        yield
        return
    with contextlib.closing(OverCluster(address, verbose)) as elsewhere, counted_by(elsewhere):
        yield
