"""Accuracy that a chain may reach, from the user's own finished runs: straight lines in log MACs with intervals. Pure.

There is no built-in prior for accuracy: the paper's numbers hold for its data alone. Three points at two or more
different costs make a line; the interval is the 95 % prediction interval of least squares with Student's t, which is
wide for few points, as it should be.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raychain.evaluators.metrics import FORMER, Definition
from raychain.records import ConfigRecord, RunRecord

FEWEST = 3
_T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t, two-sided 95 %, for 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class Point:
    """A finished stage: its model, whether it was grown, the MACs spent in the chain up to its end, and the metric."""

    model: str
    grown: bool
    macs: float
    value: float


@dataclass(frozen=True)
class Prediction:
    """A metric's expected value with its 95 % interval, and what that rests on."""

    metric: str
    label: str
    """The metric's, as people read it."""
    unit: str
    model: str
    value: float
    low: float
    high: float
    points: int
    beyond: float
    """How many times the MACs lie beyond the nearest measured ones; 1 within their range."""


def points(runs: Iterable[RunRecord], like: ConfigRecord, metric: Definition = FORMER[0]) -> list[Point]:
    """The finished stages of runs that had the same data as the config `like`, and whose `metric` was
    measured by the same evaluator."""
    found: dict[str, Point] = {}
    for run in runs:
        if _comparable(run.config, metric) != _comparable(like, metric):
            continue
        spent = 0.0
        for stage in itertools.takewhile(lambda stage: not stage.origin, run.stages or ()):  # others' MACs are unknown
            spent += stage.macs or 0
            value = metric.value(stage.metrics or {})
            if stage.status in ("trained", "reused") and value is not None:
                found[stage.key] = Point(str(stage.model), bool(stage.index), spent, value)
    return list(found.values())


def predict_metric(
    measured: Sequence[Point], model: str, *, grown: bool, macs: float, metric: Definition = FORMER[0]
) -> Prediction | str:
    """The metric of `model` after `macs` of its chain, or a sentence that says why there is no prediction."""
    own = [point for point in measured if point.model == model and point.grown == grown]
    kind = f"{model} {'grown' if grown else 'alone'}"
    if len(own) < FEWEST:
        return f"no prediction for {kind}: {len(own)} comparable finished stages under storage, {FEWEST} are needed"
    x = np.log10([point.macs for point in own])
    y = np.array([point.value for point in own])
    spread = float(((x - x.mean()) ** 2).sum())
    if spread < 1e-6:
        return f"no prediction for {kind}: its {len(own)} finished stages all cost the same"
    slope = float(((x - x.mean()) * y).sum()) / spread
    at = math.log10(macs) - float(x.mean())
    residuals = y - y.mean() - slope * (x - x.mean())
    freedom = len(own) - 2
    noise = float((residuals**2).sum()) / freedom
    half = student_t(freedom) * math.sqrt(noise * (1 + 1 / len(own) + at**2 / spread))
    value = float(y.mean()) + slope * at
    nearest = min(max(macs, 10 ** float(x.min())), 10 ** float(x.max()))
    names = metric.recorded, metric.label, metric.unit
    return Prediction(*names, model, value, value - half, value + half, len(own), max(macs / nearest, nearest / macs))


def student_t(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _comparable(config: ConfigRecord | None, metric: Definition) -> list[Any]:
    """What must be equal for two runs' metrics to be points of one line; nothing where that is not known."""
    if config is None:
        return []
    data = config.data or {}
    return [
        data.get("train"),
        data.get("samples"),
        data.get("image_size"),
        data.get("captions"),
        None if config.task in (None, {"paradigm": "clip"}) else config.task,
        (config.evaluate or {}).get(metric.name.partition("/")[0]),
    ]
