"""What a search found: the front of metric and MACs, the best chain, the comparisons that keep it honest. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raychain.evaluators.metrics import Definition
from raychain.records import ComparedRecord, ComparisonRecord
from raychain.searching.trials import Trial


def score(trial: Trial, metric: Definition) -> float | None:
    """The trial's metric; None where it has none."""
    return metric.value(trial.metrics) if trial.status == "succeeded" else None


def scored(trials: Iterable[Trial], metric: Definition) -> list[Trial]:
    """Trials with a metric, best first, cheaper first among equals."""
    return [trial for _, trial in _ranked(trials, metric)]


def pareto(trials: Iterable[Trial], metric: Definition) -> list[Trial]:
    """Those that no other beats in both metric and MACs, cheapest first; chains that are the same once."""
    front: list[tuple[float, Trial]] = []
    for rank, trial in sorted(_ranked(trials, metric), key=lambda found: found[1].macs):
        if not front or rank > front[-1][0]:
            front.append((rank, trial))
    return [trial for _, trial in front]


def best_chain(trials: Iterable[Trial], metric: Definition) -> Trial | None:
    """The chain with the best metric among those that were chosen or planned; controls do not count."""
    return next(iter(scored((t for t in trials if t.chosen), metric)), None)


def comparisons(trials: Sequence[Trial], best: Trial, metric: Definition) -> list[ComparisonRecord]:
    """The best chain against every model alone: what it reached with at most the chain's MACs, and at most at all.

    `at_equal_macs` is the control of that kind where there is one, else the best that cost no more.
    """
    found = []
    own = score(best, metric)
    for model in dict.fromkeys(t.chain[0].model for t in trials if t.kind in ("control", "equal-macs")):
        alone = [t for t in scored(trials, metric) if len(t.chain) == 1 and t.chain[0].model == model]
        if not alone:
            continue
        limit = best.macs * 1.01  # equal MACs are whole steps
        equal = next((t for t in alone if t.macs <= limit), None)
        found.append(
            ComparisonRecord(
                model=model, at_equal_macs=_brief(equal, metric, own), at_most=_brief(alone[0], metric, own)
            )
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


def _brief(trial: Trial | None, metric: Definition, best: float | None) -> ComparedRecord | None:
    value = score(trial, metric) if trial else None
    if trial is None or value is None or best is None:
        return None
    return ComparedRecord.of(
        {
            "trial": trial.number,
            "epochs": trial.chain[0].epochs,
            "macs": trial.macs,
            metric.recorded: value,
            "chain_is_ahead_by": round(metric.rank(best) - metric.rank(value), 4),
        }
    )


def _ranked(trials: Iterable[Trial], metric: Definition) -> list[tuple[float, Trial]]:
    """Trials with what they are ranked by, best first."""
    found = [(metric.rank(value), trial) for trial in trials if (value := score(trial, metric)) is not None]
    return sorted(found, key=lambda pair: (-pair[0], pair[1].macs, pair[1].number))
