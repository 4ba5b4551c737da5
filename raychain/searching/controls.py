"""Trials that no sampler chooses, and when chains are stopped early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raychain.core.wording import macs
from raychain.errors import InputError
from raychain.records import SearchRecord
from raychain.searching.campaign import Trial
from raychain.searching.halving import Halving
from raychain.searching.outcome import best_chain, scored
from raychain.searching.request import Plan
from raychain.searching.space import CHAIN, Params
from raychain.searching.tasks import Tasks

PROBE = "1000000000 steps"
"""Long enough for any warm-up, to see what a step costs."""


def controls(plan: Plan) -> Iterator[Params]:
    """Every model alone for each of the lengths, and the baseline."""
    wanted = plan.search.controls
    if wanted is None:
        return
    lengths = [str(length) for length in wanted.lengths or ()] or list(plan.space.first)
    for size in plan.space.sizes:
        for length in lengths:
            yield {CHAIN: size.name, "length": length}
    yield {CHAIN: plan.space.baseline.model, "length": str(plan.space.baseline.epochs)}


def equal_macs(plan: Plan, tasks: Tasks, trials: Sequence[Trial]) -> Iterator[Params]:
    """Every model alone at the best chain's MACs."""
    best, wanted = best_chain(trials, plan.metric), plan.search.controls
    if best is None or wanted is None or not wanted.equal_macs:
        return
    share = plan.search.proxy.epochs if plan.search.proxy else 1.0
    for size in plan.space.sizes:
        probe = tasks.task("equal-macs", {CHAIN: size.name, "length": PROBE})
        if probe is not None:
            stage = probe.stages[0]
            steps = max(1, round(best.macs * stage.steps / stage.macs / share))  # of which a proxy takes its share
            yield {CHAIN: size.name, "length": f"{steps} steps"}


def checks(plan: Plan, _: Tasks, trials: Sequence[Trial]) -> Iterator[Params]:
    """The proxy's best, its worst, and some in between, to be trained in full."""
    proxy = plan.search.proxy
    ranked = scored((t for t in trials if t.kind in ("planned", "sampled")), plan.metric)
    if proxy is None or plan.full is None or not ranked:
        return
    count = min(proxy.check, len(ranked))
    places = [round(i * (len(ranked) - 1) / max(1, count - 1)) for i in range(count)]
    for place in dict.fromkeys(places):
        yield ranked[place].params


def make_halving(plan: Plan, tasks: Tasks, before: SearchRecord | None) -> Halving | None:
    """With `asha`: the rungs, as an earlier call left them. Raises InputError for a grace that judges nobody."""
    asha = plan.search.asha
    if asha is None:
        return None
    baseline = plan.space.baseline
    alone = tasks.task("control", {CHAIN: baseline.model, "length": str(baseline.epochs)})
    whole = sum(stage.macs for stage in alone.stages) if alone else plan.space.baseline_macs
    grace = asha.grace.macs(whole)
    if grace >= whole:
        raise InputError("search.asha.grace", str(asha.grace), f"fewer than the baseline's {macs(whole)} MACs",
                         'or no chain is ever judged: "10 %" is the default')  # fmt: skip
    halving = Halving(grace, asha.reduction_factor, plan.metric.best)
    if before and before.asha:
        halving.restore(before.asha)
    return halving
