"""Asynchronous successive halving (ASHA, Li et al., MLSys 2020) of chains, at equal training MACs. Pure.

A rung is an amount of MACs, counted from the first step of a chain's first stage. A chain that passes it goes on if its
metric there is among the best of those that have passed it before. Chains that share their stages up to there are one.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from raychain.evaluators.metrics import Direction
from raychain.records import HalvingRecord, PassedRecord, VerdictRecord


class Point(NamedTuple):
    """A measurement of a chain."""

    macs: float
    value: float


class Verdict(NamedTuple):
    """Why chains end before their last step."""

    macs: float
    """MACs of a chain up to the point where it was judged."""
    value: float
    needed: float
    rivals: int
    """How many had passed the rung, these included."""


class Halving:
    """Rungs at `grace` MACs and every `factor` times as many; about one of `factor` goes on from each."""

    def __init__(self, grace: float, factor: float, best: Direction = "high") -> None:
        self.grace, self.factor, self.best = grace, factor, best
        self.passed: dict[int, dict[str, float]] = {}
        """Metric by stage key, of each rung."""
        self.behind: dict[str, Verdict] = {}
        """Stages with which chains ended that were to go on."""
        self._curves: dict[str, list[Point]] = {}

    def judge(self, keys: Sequence[str], point: Point) -> Verdict | None:
        """A measurement in the last of these stages, the first ones of a chain; a verdict if it should end with it.

        At a rung between two measurements the metric is taken as linear in MACs, from nothing at the start. Where lower
        is better nothing is known at the start, and a chain is not judged at rungs before its first measurement.
        """
        own = self._curves.setdefault(keys[-1], [])
        if point in own:
            return self.behind.get(keys[-1])
        earlier = [p for key in keys for p in self._curves.get(key, ()) if p.macs < point.macs]
        start = Point(0, 0) if self.best == "high" else Point(point.macs * (1 - 1e-9), point.value)
        before = max(earlier, default=start)
        insort(own, point)
        for rung, macs in self._rungs(before.macs, point.macs):
            values = self.passed.setdefault(rung, {})
            if keys[-1] in values:
                continue
            place = (macs - before.macs) / (point.macs - before.macs)
            values[keys[-1]] = value = before.value + place * (point.value - before.value)
            share = 1 / self.factor if self.best == "low" else 1 - 1 / self.factor
            needed = float(np.percentile(list(values.values()), 100 * share))
            if value > needed if self.best == "low" else value < needed:
                self.behind[keys[-1]] = verdict = Verdict(macs, value, needed, len(values))
                return verdict
        return None

    def ended(self, keys: Sequence[str]) -> Verdict | None:
        """The verdict on a chain that begins with these stages, if there is one."""
        return next((self.behind[key] for key in keys if key in self.behind), None)

    def state(self) -> HalvingRecord:
        """What is known, for `restore`."""
        return HalvingRecord(
            passed=[
                PassedRecord(rung=rung, macs=self.grace * self.factor**rung, values=dict(values))
                for rung, values in sorted(self.passed.items())
            ],
            behind={key: VerdictRecord(**verdict._asdict()) for key, verdict in self.behind.items()},
        )

    def restore(self, state: HalvingRecord) -> None:
        """Goes on from an earlier `state`."""
        self.passed = {entry.rung: dict(entry.values) for entry in state.passed}
        self.behind = {key: Verdict(**verdict.content()) for key, verdict in state.behind.items()}

    def _rungs(self, above: float, up_to: float) -> Iterator[tuple[int, float]]:
        rung, macs = 0, self.grace
        while macs <= up_to:
            if macs > above:
                yield rung, macs
            rung, macs = rung + 1, macs * self.factor
