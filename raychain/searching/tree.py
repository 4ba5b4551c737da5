"""The tree of stages that trials share: which stages are to be trained next, each of them once. Pure.

A trial is a path from a root; a node is a stage, known by its key, which stands for all that comes before it too. So
trials that begin alike share nodes, and nobody waits but for a node's only parent: there is no way into a deadlock.
With `schedule: wsd` the parts of a stage's trunk are nodes as well, and the stage itself is its cool-down.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(eq=False, slots=True)
class Node:
    """A stage: what it costs, and how far it is."""

    key: str
    cost: float
    parent: Node | None
    state: Literal["waiting", "taken", "done", "failed"] = "waiting"
    children: list[Node] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Trials of which it is the last stage."""
    longest: float = 0.0
    """Cost of the most expensive way from here to a leaf, its own included."""

    @property
    def ready(self) -> bool:
        """It could be trained now."""
        return self.state == "waiting" and (self.parent is None or self.parent.state == "done")

    def below(self) -> Iterator[Node]:
        """Itself and every node after it."""
        pending = [self]
        while pending:
            node = pending.pop()
            yield node
            pending += node.children


class StageTree:
    """Gives out paths of stages: list scheduling, the longest remaining way first.

    A worker group that is given a path trains its stages one after the other without starting anew; what branches off
    is ready for others as soon as its parent is done.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self._ready: list[tuple[float, int, Node]] = []
        self._order = itertools.count()

    def add(self, trial: int, path: Sequence[tuple[str, float]]) -> Literal["waiting", "done", "failed"]:
        """Adds a trial of (key, cost) stages; `done` or `failed` where its stages are so already."""
        node: Node | None = None
        for key, cost in path:
            if key not in self.nodes:
                self.nodes[key] = fresh = Node(key, cost, node)
                if node is not None:
                    node.children.append(fresh)
                    if node.state == "failed":
                        fresh.state = "failed"
            node = self.nodes[key]
        assert node is not None, "a trial has a stage"
        node.ends.append(trial)
        self._lengthen(node)
        return node.state if node.state in ("done", "failed") else "waiting"

    def take(self) -> list[str]:
        """Keys of the stages to be trained next, one after the other; none where all ready ones are taken."""
        while self._ready:
            cost, _, node = heapq.heappop(self._ready)
            if node.ready and -cost == node.longest:
                return self._take(node)
        return []

    def take_trial(self, keys: Sequence[str]) -> list[str]:
        """As `take`, those of a trial that are left; none where somebody else has begun one of them."""
        left = [self.nodes[key] for key in keys if self.nodes[key].state != "done"]
        if not left or not left[0].ready:
            return []
        for node in left:
            node.state = "taken"
        return [node.key for node in left]

    def done(self, key: str) -> list[int]:
        """The stage is finished, and so are these trials; what comes after it is ready, what came before it too."""
        node: Node | None = self.nodes[key]
        trials: list[int] = []
        while node is not None and node.state != "done":
            node.state = "done"
            trials += node.ends
            for child in node.children:
                self._offer(child)
            node = node.parent
        return sorted(trials)

    def failed(self, key: str) -> list[int]:
        """The stage cannot be trained, and these trials fail with it."""
        trials = []
        for node in self.nodes[key].below():
            if node.state != "failed":
                node.state = "failed"
                trials += node.ends
        return sorted(trials)

    def release(self, keys: Sequence[str]) -> None:
        """Gives back the stages of a path that were not trained."""
        for key in keys:
            if self.nodes[key].state == "taken":
                self.nodes[key].state = "waiting"
        for key in keys:
            self._offer(self.nodes[key])

    def _take(self, node: Node) -> list[str]:
        path = []
        while True:
            node.state = "taken"
            path.append(node.key)
            waiting = [child for child in node.children if child.state == "waiting"]
            if not waiting:
                return path
            node = max(waiting, key=lambda child: child.longest)

    def _lengthen(self, node: Node | None) -> None:
        """`longest` of a node and its ancestors, after something was added below."""
        below = 0.0
        while node is not None:
            longest = node.cost + below
            if longest > node.longest:
                node.longest = longest
                self._offer(node)
            below, node = node.longest, node.parent

    def _offer(self, node: Node) -> None:
        if node.ready:
            heapq.heappush(self._ready, (-node.longest, next(self._order), node))
