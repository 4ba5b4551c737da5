"""Trials that no sampler chooses, and what chains are measured by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from raychain.core.wording import macs
from raychain.errors import InputError
from raychain.searching.judging import Rungs
from raychain.searching.outcome import best_chain, scored
from raychain.searching.request import Plan
from raychain.searching.space import CHAIN, Params
from raychain.searching.tasks import Tasks
from raychain.searching.trials import Trial

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
    yield baseline_choices(plan)


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
    ranked = scored((t for t in trials if t.chosen), plan.metric)
    if proxy is None or plan.full is None or not ranked:
        return
    count = min(proxy.check, len(ranked))
    places = [round(i * (len(ranked) - 1) / max(1, count - 1)) for i in range(count)]
    for place in dict.fromkeys(places):
        yield ranked[place].params


def proposed(plan: Plan, tasks: Tasks) -> list[Params]:
    """The planner's proposals that are tried first."""
    found: dict[str, Params] = {}
    with contextlib.suppress(InputError):  # the planner may have nothing for such a family
        for params in plan.space.planned():
            if len(found) == plan.search.seeds:
                break
            task = tasks.task("planned", params) if plan.space.affordable(params) else None
            if task is not None:
                found.setdefault(task.stages[-1].key, params)
    return list(found.values())


def baseline_choices(plan: Plan) -> Params:
    """The choices of the control that is the baseline."""
    return {CHAIN: plan.space.baseline.model, "length": str(plan.space.baseline.epochs)}


def baseline_macs(plan: Plan, tasks: Tasks) -> float:
    """The MACs of the baseline, as trials are trained."""
    task = tasks.task("control", baseline_choices(plan))
    return sum(stage.macs for stage in task.stages) if task else plan.space.baseline_macs


def make_rungs(plan: Plan, baseline: float) -> Rungs | None:
    """With `asha`: its rungs. Raises InputError for a grace that judges nobody."""
    asha = plan.search.asha
    if asha is None:
        return None
    grace = asha.grace.macs(baseline)  # type: ignore[arg-type]
    if grace >= baseline:
        raise InputError("search.asha.grace", str(asha.grace), f"fewer than the baseline's {macs(baseline)} MACs",
                         'or no chain is ever judged: "10 %" is the default')  # fmt: skip
    return Rungs(100 * grace / baseline, asha.reduction_factor, baseline, plan.metric.best)
