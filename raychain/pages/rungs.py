"""How a search was decided: Ray Tune's parts, the rungs that chains passed, and the verdicts on those behind."""

from __future__ import annotations

import math
import statistics

from raychain.core.wording import macs
from raychain.pages.loading import amount
from raychain.pages.markup import Markup, join, tag
from raychain.pages.search_json import Search, Trial
from raychain.pages.searched import named
from raychain.pages.tables import table


def parts(search: Search) -> Markup | None:
    """Who chose the chains, who stopped them, and where Tune's own tools find the trials."""
    if not search.parts:
        return None
    told = "; ".join(f"{what}: {names}" for what, names in search.parts)
    where = "Ray Tune's own trials are in the folder tune: ExperimentAnalysis and TensorBoard read it."
    return tag("p", f"{told}. {where}", class_="summary")


def rungs(search: Search) -> Markup | None:
    """A row a rung, then a row a verdict; None where no chain was judged at rungs."""
    if search.asha is None or not search.asha.passed:
        return None
    metric, alone = search.metric, amount(search.baseline.macs)
    unit = f"{metric.label} {metric.unit}".strip()
    passed = []
    for entry in search.asha.passed:
        ranked = sorted(entry.values.values(), key=metric.rank, reverse=True)
        stopped = sum(math.isclose(verdict.macs, entry.macs or 0) for verdict in search.asha.behind.values())
        share = f"{100 * entry.macs / alone:.3g} %" if alone and entry.macs else None
        middle = metric.number(statistics.median(ranked)) if ranked else None
        best = metric.number(ranked[0]) if ranked else None
        passed.append((f"{entry.rung}", macs(amount(entry.macs)), share, f"{len(ranked)}", best, middle, f"{stopped}"))
    heads = (("rung", True), ("MACs", True), ("of the baseline's", True), ("passed by", True), (f"best {unit}", True),
             ("median", True), ("stopped there", True))  # fmt: skip
    verdicts = [
        (named(search, ended[0]), ", ".join(f"{n}" for n in ended[1]), macs(amount(verdict.macs)),
         metric.number(verdict.value), metric.number(verdict.needed), f"{verdict.rivals - 1}")
        for key, verdict in search.asha.behind.items() if (ended := _ended(search, key))
    ]  # fmt: skip
    behind = (("chain: model, epochs", False), ("trials", False), ("judged at MACs", True), (unit, True),
              ("needed", True), ("passed before it", True))  # fmt: skip
    return join([table(heads, passed), tag("h3", "Behind others") if verdicts else None,
                 table(behind, verdicts) if verdicts else None])  # fmt: skip


def _ended(search: Search, key: str) -> tuple[Trial, list[int]] | None:
    """The chain up to this stage, and the trials that ended with it."""
    having = [trial for trial in search.trials if key in (step.key for step in trial.chain)]
    if not having:
        return None
    last = [step.key for step in having[0].chain].index(key)
    chain = having[0]._replace(chain=having[0].chain[: last + 1])
    return chain, [trial.number for trial in having if trial.status == "stopped"]
