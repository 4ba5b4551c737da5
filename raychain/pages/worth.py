"""Was the chain worth it? Its score against the last model alone, at what cost; each said to be measured or planned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from raychain import records
from raychain.core.json import Json
from raychain.core.storage import Folder, split_options
from raychain.core.wording import macs, named_by, percent
from raychain.errors import InputError
from raychain.evaluators.metrics import Definition
from raychain.pages.chain_drawing import baseline
from raychain.pages.loading import Run, amount, mapping
from raychain.pages.markup import Markup, tag
from raychain.pages.search_json import Search
from raychain.records import RunRecord, TotalsRecord

ALONE = "-alone"
"""What follows a run folder's name in that of its last model trained alone (`raychain run --alone`)."""
COMPARED = ("train", "captions", "image_size", "key_split", "demo")
"""Keys of `data` that have to be the same."""


class Alone(NamedTuple):
    """The last model trained alone, as it was measured."""

    macs: float | None
    metrics: dict[str, float]
    folder: str
    date: str


def beside(folder: Folder, run: Run | None) -> Alone | None:
    """What was measured of the last model alone, in the folder beside the run's; None where nothing that compares."""
    if run is None or len(run.stages) < 2:
        return None
    address = alone_address(folder.address)
    try:
        found = records.read(Folder(address), "run.json", RunRecord, quiet=True)
    except (OSError, InputError):
        return None
    stages = (found.stages if found else None) or []
    if found is None or len(stages) != 1:
        return None
    stage = stages[0]
    config = found.config.content() if found.config else {}
    metrics = {key: float(value) for key, value in (stage.metrics or {}).items() if value is not None}
    if stage.model != baseline(run)[0] or not metrics or not _same(run.config, config):
        return None
    date = str((found.environment or {}).get("date") or "").partition("T")[0]
    return Alone(amount(stage.macs), metrics, named_by(address), date)


def _same(ours: Json, theirs: Json) -> bool:
    """Whether both were trained and measured on the same data, as far as experiments say."""
    data = [{key: mapping(config.get("data")).get(key) for key in COMPARED} for config in (ours, theirs)]
    return data[0] == data[1] and mapping(ours.get("evaluate")) == mapping(theirs.get("evaluate"))


def worth(run: Run, alone: Alone | None) -> Markup | None:
    """The page's first answer; None for one model, which is no chain."""
    if len(run.stages) < 2:
        return None
    return _answered(*_answer(run, alone))


def _answered(answer: str, told: str) -> Markup:
    return tag("p", tag("strong", "Was the chain worth it? "), tag("b", answer, class_=_CLASSES.get(answer)),
               f" {told}", class_="worth")  # fmt: skip


_CLASSES = {"Yes.": "good", "No.": "warn"}


def _answer(run: Run, alone: Alone | None) -> tuple[str, str]:
    totals = run.record.totals or TotalsRecord()
    name, length = baseline(run)
    large = f"{name} alone for {length}" if length else f"{name} alone"
    last, score = run.stages[-1], next(iter(run.measures), None)
    share = amount(totals.percent_of_baseline)
    cost = f"{percent(share)} % of the MACs of {large}" if share is not None else f"a part of the MACs of {large}"
    if not last.done:
        return "Not known yet.", f"The chain is not finished. As planned it takes {cost}; {_unmeasured(run, alone)}"
    value = score.value(last.metrics) if score else None
    if score is None or value is None:
        return "Not known.", f"Nothing was measured (evaluate). The chain took {cost}, as counted."
    reached = f"The chain reached {score.written(value)} {score.label} for {cost}"
    other = score.value(alone.metrics) if alone else None
    if alone is None or other is None:
        planned = f" ({macs(totals.baseline_macs)}, planned)" if totals.baseline_macs else ""
        return (
            "Not known.",
            f"{reached}{planned}. What that reaches was not measured: raychain run --alone measures it.",
        )
    if alone.macs and last.macs and totals.macs:
        share = 100 * totals.macs / alone.macs
        cost = f"{percent(share)} % of the MACs of {name} alone"
        reached = f"The chain reached {score.written(value)} {score.label} for {cost}"
    when = f", {alone.date}" if alone.date else ""
    both = (
        f"that model alone reached {score.written(other)} ({macs(alone.macs)} MACs, measured in {alone.folder}{when})"
    )
    return _verdict(score, value, other, share), f"{reached}; {both}. One run each: other seeds would differ a little."


def _unmeasured(run: Run, alone: Alone | None) -> str:
    score = next(iter(run.measures), None)
    other = score.value(alone.metrics) if score and alone else None
    if score is None or other is None:
        return "what that model reaches alone was not measured."
    return f"that model alone reached {score.written(other)} {score.label}, measured."


def _verdict(score: Definition, value: float, other: float, share: float | None) -> str:
    if score.rank(value) >= score.rank(other) - score.tie:
        return "Yes." if share is not None and share < 100 else "In accuracy, and not in cost."
    return "No." if share is None or share >= 100 else "Cheaper, and not as good."


def worth_of_search(search: Search) -> Markup | None:
    """The same of a search: its best chain against the models alone that were tried; None without a measured chain."""
    metric = search.metric
    measured = [trial for trial in search.trials if trial.macs and search.value(trial) is not None]
    chains = sorted((t for t in measured if len(t.chain) > 1), key=search.rank)
    if not chains:
        return None
    best = chains[-1]
    value, cost = search.value(best) or 0.0, best.macs or 0.0
    told = f"The best chain reached {metric.written(value)} {metric.label} for {macs(cost)} MACs"
    alone = sorted(_models_alone(search), key=lambda found: metric.rank(found.value))
    large = [found for found in alone if found.model == best.chain[-1].model]
    cheaper = [found for found in alone if found.macs <= 1.02 * cost]
    if cheaper and metric.rank(cheaper[-1].value) > metric.rank(value) + metric.tie:
        answer, against = "No.", f"{_said(metric, cheaper[-1])}, and costs no more"
    elif not large:
        answer, against = "Not known.", "the last model alone was not measured"
    elif metric.rank(value) >= metric.rank(large[-1].value) - metric.tie:
        share = 100 * cost / (large[-1].macs or 1.0)
        answer = "Yes." if share < 100 else "In accuracy, and not in cost."
        against = f"{percent(share)} % of what {_said(metric, large[-1])}, took"
    else:
        answer, against = "Cheaper, and not as good.", _said(metric, large[-1])
    once = "" if answer == "Not known." else " All of this was measured, once each."
    return _answered(answer, f"{told}; {against}.{once}")


class _ModelAlone(NamedTuple):
    """A model that a search trained without a chain."""

    model: str
    macs: float
    value: float


def _models_alone(search: Search) -> Iterator[_ModelAlone]:
    """Models alone among the trials and in the comparisons, as far as they were measured."""
    for trial in search.trials:
        value = search.value(trial)
        if len(trial.chain) == 1 and trial.macs and value is not None:
            yield _ModelAlone(trial.chain[0].model, trial.macs, value)
    for compared in search.comparisons:
        for found in (compared.at_equal_macs, compared.at_most):
            value = search.metric.value(found.content()) if found is not None else None
            if found is not None and value is not None:
                yield _ModelAlone(compared.model, found.macs, value)


def _said(metric: Definition, found: _ModelAlone) -> str:
    return f"{found.model} alone, with {metric.written(found.value)} for {macs(found.macs)} MACs"


def alone_address(folder: str) -> str:
    """Where a run at `folder` has its last model trained alone."""
    base, options = split_options(folder)
    return base.rstrip("/") + ALONE + options
