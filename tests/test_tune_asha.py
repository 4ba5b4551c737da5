"""ASHA, as Tune decides it for chains that share stages, is what a few lines without Tune say of recorded curves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from raychain.searching.judging import Rungs
from raychain.searching.tune.scheduler import HalvingScheduler

CURVES: list[list[dict[str, Any]]] = json.loads((Path(__file__).parent / "curves.json").read_text())
"""What six chains of a search reported, measured every ten steps, none stopped; the last has not ended."""
METRIC = "zero_shot_top1"
GRACE, FACTOR = 4.0, 2.0


def quantile(values: list[float], share: float) -> float:
    """Linear between the two values next to it."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


class Simulation:
    """The paper's rule at equal MACs: at a rung who is not among the best 1/FACTOR of those before it is stopped.

    Chains that share the stage in which they pass a rung pass it together: the first to report decides for all.
    """

    def __init__(self, *, high: bool) -> None:
        self.sign = 1 if high else -1
        self.passed: dict[int, dict[str, float]] = {}
        self.verdicts: dict[tuple[str, int], bool] = {}

    def stops(self, curve: list[dict[str, Any]], at: int) -> bool:
        report = curve[at]
        place = report["key"], report["step"]
        if place not in self.verdicts:
            self.verdicts[place] = self._behind(curve[at - 1] if at else None, report)
        return self.verdicts[place] and not report["complete"]

    def _behind(self, before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
        if before is None and self.sign < 0:  # of a loss nothing is known before its first measurement
            start, first = now["percent"], now[METRIC]
        else:
            start, first = (before["percent"], before[METRIC]) if before else (0.0, 0.0)
        for rung in range(30):
            milestone = GRACE * FACTOR**rung
            if not start < milestone <= now["percent"] or now["key"] in self.passed.get(rung, {}):
                continue
            others = self.passed.setdefault(rung, {})
            share = (milestone - start) / (now["percent"] - start)
            value = self.sign * (first + share * (now[METRIC] - first))
            needed = quantile(list(others.values()), 1 - 1 / FACTOR) if others else None
            others[now["key"]] = value
            if needed is not None and value < needed:
                return True
        return False


def deliveries(seed: int) -> list[int]:
    """Trials in the order in which they report, each as often as its curve is long; some have a head start."""
    chance = random.Random(seed)
    weights = [chance.choice([1, 1, 5]) for _ in CURVES]
    left = [len(curve) for curve in CURVES]
    found = []
    while any(left):
        (number,) = chance.choices(range(len(CURVES)), [w * n for w, n in zip(weights, left, strict=True)])
        left[number] -= 1
        found.append(number)
    return found


@pytest.mark.parametrize("best", ["high", "low"])
def test_decisions_on_recorded_curves_are_those_of_a_simulation(best: Any) -> None:
    curves = CURVES if best == "high" else [[r | {METRIC: 100 - r[METRIC]} for r in curve] for curve in CURVES]
    stopped_in_all = 0
    for seed in range(40):
        wanted, rungs = Simulation(high=best == "high"), Rungs(GRACE, FACTOR, 1e12, best)
        scheduler = HalvingScheduler(rungs, METRIC)
        controller: Any = None
        trials: list[Any] = [
            SimpleNamespace(trial_id=f"{n}", config={"number": n, "kind": "sampled"}) for n in range(len(curves))
        ]
        for trial in trials:
            scheduler.on_trial_add(controller, trial)
        at, stopped = [0] * len(curves), set()
        for number in deliveries(seed):
            if number in stopped:
                continue
            decision = scheduler.on_trial_result(controller, trials[number], dict(curves[number][at[number]]))
            behind = wanted.stops(curves[number], at[number])
            assert (decision == TrialScheduler.STOP) == behind, (seed, number, at[number])
            if behind:
                stopped.add(number)
            at[number] += 1
        signs = {rung: {k: wanted.sign * v for k, v in values.items()} for rung, values in wanted.passed.items()}
        assert {rung: pytest.approx(values) for rung, values in signs.items()} == rungs.passed
        stopped_in_all += len(stopped)
    assert 40 < stopped_in_all < 40 * len(curves), "some are stopped and some are not"
