"""What a search found: the front of metric and MACs, the best chain, the comparisons that keep it honest. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from raychain.searching.campaign import Trial

TIE = 0.05
"""Percentage points that a table would not show."""


def score(trial: Trial, metric: str) -> float | None:
    """The trial's metric; None where it has none."""
    return trial.metrics.get(metric) if trial.status == "succeeded" else None


def scored(trials: Iterable[Trial], metric: str) -> list[Trial]:
    """Trials with a metric, best first, cheaper first among equals."""
    found = [trial for trial in trials if score(trial, metric) is not None]
    return sorted(found, key=lambda trial: (-(score(trial, metric) or 0.0), trial.macs, trial.number))


def pareto(trials: Iterable[Trial], metric: str) -> list[Trial]:
    """Those that no other beats in both metric and MACs, cheapest first; chains that are the same once."""
    front: list[Trial] = []
    for trial in sorted(scored(trials, metric), key=lambda t: (t.macs, -(score(t, metric) or 0.0), t.number)):
        if not front or (score(trial, metric) or 0.0) > (score(front[-1], metric) or 0.0):
            front.append(trial)
    return front


def best_chain(trials: Iterable[Trial], metric: str) -> Trial | None:
    """The chain with the highest metric among those that were chosen or planned; controls do not count."""
    return next(iter(scored((t for t in trials if t.kind in ("planned", "sampled")), metric)), None)


def comparisons(trials: Sequence[Trial], best: Trial, metric: str) -> list[dict[str, Any]]:
    """The best chain against every model alone: what it reached with at most the chain's MACs, and at most at all.

    `at_equal_macs` is the control of that kind where there is one, else the best that cost no more.
    """
    found = []
    own = score(best, metric) or 0.0
    for model in dict.fromkeys(t.chain[0]["model"] for t in trials if t.kind in ("control", "equal-macs")):
        alone = [t for t in scored(trials, metric) if len(t.chain) == 1 and t.chain[0]["model"] == model]
        if not alone:
            continue
        limit = best.macs * 1.01  # equal MACs are whole steps
        equal = next((t for t in alone if t.macs <= limit), None)
        found.append(
            {
                "model": model,
                "at_equal_macs": _brief(equal, metric, own),
                "at_most": _brief(alone[0], metric, own),
            }
        )
    return found


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's; ties share their ranks. None for fewer than three pairs, or where one side is all ties."""
    if len(pairs) < 3:
        return None
    left, right = (_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    middle = (len(pairs) + 1) / 2
    products = sum((a - middle) * (b - middle) for a, b in zip(left, right, strict=True))
    spread = sum((a - middle) ** 2 for a in left) * sum((b - middle) ** 2 for b in right)
    return round(products / spread**0.5, 4) if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + 1 + (ordered.count(value) - 1) / 2 for value in values]


def _brief(trial: Trial | None, metric: str, best: float) -> dict[str, Any] | None:
    if trial is None:
        return None
    value = score(trial, metric) or 0.0
    return {
        "trial": trial.number,
        "epochs": trial.chain[0]["epochs"],
        "macs": trial.macs,
        metric: value,
        "chain_is_ahead_by": round(best - value, 4),
    }
