"""Chains that the three principles propose for a family, a data size and a budget. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from raychain.errors import InputError
from raychain.planning import checks
from raychain.planning.cost import ChainCost, Setting, predict
from raychain.planning.macs import ModelSize
from raychain.planning.principles import (
    RATIOS,
    alone_epochs,
    default_rules,
    linear_epochs,
    ratio_excess,
    smallest_model,
    smallest_size,
)
from raychain.schema.allocation import Budget

MOST_MODELS = 16
"""Models of a family: the number of chains doubles with every one."""


class Limits(NamedTuple):
    """What a user may ask of the proposals (`allocation` in an experiment)."""

    first: float | None = None
    rules: tuple[tuple[float, float], ...] | None = None
    ratios: tuple[float, float] | None = None
    budget: Budget | None = None
    all_models: bool = False


class Candidate(NamedTuple):
    """A chain of a family under one epoch rule."""

    sizes: tuple[ModelSize, ...]
    rule: tuple[float, float]
    epochs: tuple[float, ...]


@dataclass(frozen=True)
class Proposal:
    """A candidate with its cost and the principles it breaks."""

    cost: ChainCost
    rule: tuple[float, float]
    broken: tuple[str, ...]
    """Names of principles: `smallest model`, `expansion ratios`, `epochs`."""
    excess: float
    """Octaves by which expansion ratios leave their bounds, summed over the chain."""


def enumerate_chains(
    family: Sequence[ModelSize],
    first: float,
    rules: Sequence[tuple[float, float]],
    *,
    all_models: bool = False,
    apart: Collection[tuple[str, str]] = (),
) -> Iterator[Candidate]:
    """Every chain of at least two models that ends with the family's largest, under every rule.

    With `all_models` only the whole family. Chains that two rules give the same epochs come once. Those with two
    models that are to be kept `apart` as neighbours do not come.
    """
    *others, largest = sorted(family, key=lambda size: size.params)
    for count in [len(others)] if all_models else range(1, len(others) + 1):
        for chosen in itertools.combinations(others, count):
            if apart and any((a.name, b.name) in apart for a, b in itertools.pairwise((*chosen, largest))):
                continue
            seen = set()
            for rule in rules:
                epochs = linear_epochs(first, rule, count)
                if epochs not in seen:
                    seen.add(epochs)
                    yield Candidate((*chosen, largest), rule, epochs)


def propose(
    family: Sequence[ModelSize],
    setting: Setting,
    limits: Limits = Limits(),  # noqa: B008 - immutable
    baseline: tuple[ModelSize, float] | None = None,
    apart: Collection[tuple[str, str]] = (),
    *,
    principled: bool = True,
) -> list[Proposal]:
    """All chains within the limits: those that break no principle first, then by cost.

    Ratio bounds that the user gave are kept; the default ones only rank, since some families cannot keep them.
    `apart` are pairs of models that do not grow into one another. Where the principles are not known to hold
    (`principled`), chains differ in their cost alone. Raises InputError with the nearest alternative where no chain is
    left.
    """
    _check_family(family)
    first = limits.first or alone_epochs(setting.samples)
    rules = limits.rules or default_rules(first)
    if limits.rules and max(start for start, _ in rules) >= first:
        start = max(start for start, _ in rules)
        raise InputError("allocation.rules", f"{start:g} epochs after the first model's {first:g}",
                         "fewer than the first model's", "lower the rule or raise allocation.first")  # fmt: skip
    smallest = family[smallest_model([size.principal_params for size in family], setting.samples)]
    proposals = [
        _judge(candidate, setting, limits, smallest if principled else None, baseline)
        for candidate in enumerate_chains(family, first, rules, all_models=limits.all_models, apart=apart)
    ]
    if not proposals:
        raise InputError("family", ", ".join(size.name for size in family), "models that grow into one another",
                         "leave some out, or allocation.all_models")  # fmt: skip
    proposals.sort(key=lambda proposal: (len(proposal.broken), proposal.excess, proposal.cost.macs))
    return _affordable(_within_ratios(proposals, limits), limits.budget)


def why(proposal: Proposal, samples: int, *, principled: bool = True) -> list[str]:
    """The reasons for a proposal, principle by principle."""
    cost = proposal.cost
    if not principled:
        return ["cost: the lowest of the chains within the limits; nothing else is known of chains of this paradigm"]
    first, grown = cost.stages[0], len(cost.stages) - 1
    given, wanted = (f"{params / 1e6:.2g} M" for params in (first.size.principal_params, smallest_size(samples)))
    ratios = ", ".join(f"{ratio:.1f}" for ratio in cost.ratios)
    bounds = f"the published {RATIOS[0]:g} to {RATIOS[1]:g}"
    fall = f"{cost.epochs[1]:g} → {cost.epochs[-1]:g}, falling linearly" if grown > 1 else f"{cost.epochs[1]:g}"
    near = "as near as the family and the limits allow" if "smallest model" in proposal.broken else "the nearest"
    within = f"outside of {bounds}" if "expansion ratios" in proposal.broken else f"within {bounds}"
    known = "fewer than any published" if "epochs" in proposal.broken else "no fewer than published"
    return [
        f"smallest model: {samples:,} samples suggest {wanted} parameters in the image tower; {first.size.name} has "
        f"{given}, {near}",
        f"expansion ratios: {ratios}, {within}",
        f"epochs: {cost.epochs[0]:g}, then {fall}, {known} for {len(cost.stages)} models",
        "cost: the lowest of the chains that break as little" if proposal.broken else "cost: the lowest of such chains",
    ]


def _judge(
    candidate: Candidate,
    setting: Setting,
    limits: Limits,
    smallest: ModelSize | None,
    baseline: tuple[ModelSize, float] | None,
) -> Proposal:
    cost = predict(candidate.sizes, candidate.epochs, setting, baseline)
    excess = sum(ratio_excess(ratio, limits.ratios or RATIOS) for ratio in cost.ratios)
    if smallest is None:
        return Proposal(cost, candidate.rule, (), excess if limits.ratios else 0.0)
    # The largest model is given: where it is itself the nearest to the data's size, any start below it will do.
    largest = candidate.sizes[-1].name
    broken = {
        "smallest model": candidate.sizes[0].name != smallest.name and smallest.name != largest,
        "expansion ratios": excess > 0,
        "epochs": bool(checks.epoch_warnings(candidate.epochs)),
    }
    return Proposal(cost, candidate.rule, tuple(name for name, is_broken in broken.items() if is_broken), excess)


def _check_family(family: Sequence[ModelSize]) -> None:
    names = [size.name for size in family]
    if len(set(names)) < 2:
        raise InputError("family", ", ".join(names) or "no model", "at least two models",
                         "add a smaller or a larger model, or give `chain:`")  # fmt: skip
    if len(names) > MOST_MODELS:
        raise InputError("family", f"{len(names)} models", f"at most {MOST_MODELS}", "leave some out")


def _within_ratios(proposals: list[Proposal], limits: Limits) -> list[Proposal]:
    kept = [proposal for proposal in proposals if not (limits.ratios and proposal.excess > 0)]
    if kept or limits.ratios is None:
        return kept
    near = min(proposals, key=lambda proposal: (proposal.excess, len(proposal.broken), proposal.cost.macs))
    low, high = min(near.cost.ratios), max(near.cost.ratios)
    raise InputError(
        "allocation.ratios",
        f"[{limits.ratios[0]:g}, {limits.ratios[1]:g}]",
        "bounds that some chain of the family keeps",
        f"the nearest is {describe(near.cost)}: allow its ratios with allocation.ratios=[{_floor(low)}, {_ceil(high)}]",
    )


def _affordable(proposals: list[Proposal], budget: Budget | None) -> list[Proposal]:
    if budget is None:
        return proposals
    kept = [proposal for proposal in proposals if proposal.cost.macs <= budget.macs(proposal.cost.baseline.macs)]
    if kept:
        return kept
    cheapest = min(proposals, key=lambda proposal: proposal.cost.macs).cost
    raise InputError(
        "allocation.budget",
        budget,
        f"at least {cheapest.percent_of_baseline:.1f} % of the baseline ({cheapest.macs:.3g} MACs)",
        f"the cheapest chain is {describe(cheapest)}; raise the budget, or lower allocation.first or allocation.rules",
    )


def describe(cost: ChainCost) -> str:
    """`A 128 → B 24 → C 14, 27.6 % of the baseline (9.32e+18 MACs)`."""
    stages = " → ".join(f"{model} {epochs:g}" for model, epochs in zip(cost.models, cost.epochs, strict=True))
    return f"{stages}, {cost.percent_of_baseline:.1f} % of the baseline ({cost.macs:.3g} MACs)"


def _floor(ratio: float) -> str:
    return f"{int(ratio * 10) / 10:g}"


def _ceil(ratio: float) -> str:
    return f"{-int(-ratio * 10 // 1) / 10:g}"
