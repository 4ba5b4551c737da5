"""Successive halving of chains at equal training MACs: where a chain passes a rung, and what is known there. Pure.

Tune's ASHA decides (ASHA, Li et al., MLSys 2020); it compares a trial's value at the first report after a rung, with
those of others at theirs. Chains are measured at irregular MACs, so their values are made comparable here. A rung is a
share of the baseline's MACs, counted from the first step of a chain's first stage. Chains that share their stages up to
there are one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from raychain.core.wording import macs
from raychain.evaluators.metrics import Definition, Direction
from raychain.records import HalvingRecord, PassedRecord, VerdictRecord

LIMIT = 1e6
"""Percent of the baseline's MACs at which there are no more rungs."""


class Point(NamedTuple):
    """A measurement of a chain."""

    percent: float
    value: float


class Passed(NamedTuple):
    """A chain's value at a rung."""

    rung: int
    percent: float
    value: float


class Verdict(NamedTuple):
    """Why chains end before their last step."""

    macs: float
    """MACs of a chain up to the point where it was judged."""
    value: float
    needed: float
    rivals: int
    """How many had passed the rung, these included."""


class Rungs:
    """Rungs at `grace` percent of `baseline` MACs and every `factor` times as many; about one of `factor` goes on."""

    def __init__(self, grace: float, factor: float, baseline: float, best: Direction = "high") -> None:
        self.grace, self.factor, self.baseline, self.best = grace, factor, baseline, best
        self.passed: dict[int, dict[str, float]] = {}
        """Metric by stage key, of each rung."""
        self.behind: dict[str, Verdict] = {}
        """Stages with which chains ended that were to go on."""

    def between(self, before: Point | None, now: Point) -> Iterator[Passed]:
        """The rungs that a chain has passed since its measurement `before`, None: its start.

        Its metric there is taken as linear in MACs, from nothing at the start. Where lower is better nothing is known
        at the start, and a chain is not judged at rungs before its first measurement.
        """
        if before is None:
            before = Point(0, 0) if self.best == "high" else Point(now.percent * (1 - 1e-9), now.value)
        rung, at = 0, self.grace
        while at <= now.percent:
            if at > before.percent:
                share = (at - before.percent) / (now.percent - before.percent)
                yield Passed(rung, at, before.value + share * (now.value - before.value))
            rung += 1
            at = self.grace * self.factor**rung

    def note(self, key: str, found: Passed, *, stopped: bool) -> None:
        """What became of a chain that ends with this stage so far."""
        values = self.passed.setdefault(found.rung, {})
        if stopped:
            needed, spent = self.needed(list(values.values())), found.percent * self.baseline / 100
            self.behind[key] = Verdict(spent, found.value, found.value if needed is None else needed, len(values) + 1)
        values[key] = found.value

    def needed(self, values: Sequence[float]) -> float | None:
        """What a chain must have at a rung that others have passed with these; None: anything will do."""
        if not values:
            return None
        share = 1 / self.factor if self.best == "low" else 1 - 1 / self.factor
        return float(np.percentile(values, 100 * share))

    def ended(self, keys: Sequence[str]) -> Verdict | None:
        """The verdict on a chain that begins with these stages, if there is one."""
        return next((self.behind[key] for key in keys if key in self.behind), None)

    def words(self, verdict: Verdict, metric: Definition) -> str:
        """The verdict as people read it."""
        return (
            f"behind at {macs(verdict.macs)} MACs: {metric.label} {metric.written(verdict.value)}, where the best "
            f"1/{self.factor:g} of {verdict.rivals - 1} before it have {metric.written(verdict.needed)}"
        )

    def state(self) -> HalvingRecord:
        """What is known, for `restore`."""
        return HalvingRecord(
            passed=[
                PassedRecord(rung=rung, macs=self.grace * self.factor**rung * self.baseline / 100, values=dict(values))
                for rung, values in sorted(self.passed.items())
            ],
            behind={key: VerdictRecord(**verdict._asdict()) for key, verdict in self.behind.items()},
        )

    def restore(self, state: HalvingRecord) -> None:
        """Goes on from an earlier `state`."""
        self.passed = {entry.rung: dict(entry.values) for entry in state.passed}
        self.behind = {key: Verdict(**verdict.content()) for key, verdict in state.behind.items()}
