"""What of search.json can be shown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from raychain.core.json import Json
from raychain.core.wording import several
from raychain.evaluators.metrics import Definition, read_back
from raychain.pages.loading import amount, numbers
from raychain.records import BaselineRecord, ChainedRecord, ComparisonRecord, HalvingRecord, SearchRecord, TrialRecord


class Step(NamedTuple):
    """A stage of a trial's chain; what else it was trained with distinguishes it too."""

    model: str
    length: str
    rest: str
    key: str = ""
    """Its content address, where the search has it: stages of one key are one."""


class Trial(NamedTuple):
    """A trial, as it is shown."""

    number: int
    chain: tuple[Step, ...]
    macs: float | None
    metrics: dict[str, float]
    status: str
    reason: str
    """Why it failed or was stopped early; else empty."""
    rest: Json


class Search(NamedTuple):
    """A search, as it is shown."""

    trials: list[Trial]
    front: list[Trial]
    best: Trial | None
    metric: Definition
    """What trials are judged by."""
    baseline: BaselineRecord
    comparisons: list[ComparisonRecord]
    requested: float | None
    trained: float | None
    measures: list[Definition]
    """The metrics that matter most."""
    asha: HalvingRecord | None
    parts: list[tuple[str, str]]
    """What of Ray Tune's chose and stopped chains: what it is, and its name."""

    def value(self, trial: Trial) -> float | None:
        """What the trial is judged by."""
        return self.metric.value(trial.metrics)

    def rank(self, trial: Trial) -> float:
        """Higher for better trials; those without the metric come last."""
        value = self.value(trial)
        return -math.inf if value is None else self.metric.rank(value)


def parse(record: SearchRecord) -> Search:
    """What of a search can be shown."""
    trials = [_trial(trial) for trial in record.trials or ()]
    by_number = {trial.number: trial for trial in trials}
    definitions = read_back({"metrics": record.metrics})
    metric = _judged_by(definitions, record.metric, trials)
    measured = [trial for trial in trials if trial.macs and metric.value(trial.metrics) is not None]
    named = [by_number.get(found.number) for found in record.pareto or ()]
    front = sorted({t.number: t for t in named if t in measured and t}.values(), key=lambda t: t.macs or 0)
    best = by_number.get(record.best.number) if record.best else None
    if best is None and measured:
        best = max(measured, key=lambda t: metric.rank(metric.value(t.metrics) or 0.0))
    return Search(
        trials, front or _front(measured, metric), best, metric, record.baseline or BaselineRecord(),
        record.comparisons or [], record.stage_epochs_requested, record.stage_epochs_trained,
        [definition for definition in definitions if definition.brief], record.asha, _parts(record),
    )  # fmt: skip


def _parts(record: SearchRecord) -> list[tuple[str, str]]:
    settings = (record.config or {}).get("search")
    if record.tune is None or not isinstance(settings, dict):
        return []
    settings = settings | {"scheduler": "asha" if record.asha else settings.get("scheduler")}
    found = []
    for key, what in (("sampler", "Chosen by"), ("scheduler", "judged by"), ("stop", "ended by")):
        value = settings.get(key)
        entries = value if isinstance(value, list) else [value]
        names = [entry.get("name") if isinstance(entry, dict) else entry for entry in entries]
        if told := ", ".join(name for name in names if isinstance(name, str)):
            found.append((what, told))
    return found


def _judged_by(definitions: Sequence[Definition], name: str | None, trials: Sequence[Trial]) -> Definition:
    """The metric that the search names, else the first one that a trial has."""
    if name:
        found = next((d for d in definitions if name in (d.name, d.former)), None)
        return found or Definition(name, name, "%", "high")
    had = (d for d in definitions if any(d.value(trial.metrics) is not None for trial in trials))
    other = next((key for trial in trials for key in trial.metrics), None)
    fallback = Definition(other, other, "%", "high") if other else definitions[0]
    return next(had, fallback)


def _trial(record: TrialRecord) -> Trial:
    steps = tuple(_step(stage) for stage in (record.chain or ())[:16])
    if record.keys and len(record.keys) == len(steps):
        steps = tuple(step._replace(key=key) for step, key in zip(steps, record.keys, strict=True))
    told = ("chain", "length", "first", "rules")  # the chain says these
    params = {name: v for name, v in record.params.items() if not isinstance(v, dict | list)}
    settings = {name: v for name, v in params.items() if name not in told and not name.startswith(("grown.", "share."))}
    rest = {"kind": record.kind} | (record.model_extra or {}) | settings
    metrics, reason = numbers(record.metrics), record.reason or ""
    return Trial(record.number, steps, amount(record.macs), metrics, record.status, reason, rest)


def _step(stage: ChainedRecord) -> Step:
    length = several(stage.epochs, "epoch", ".3g")
    rest = {name: value for name, value in (stage.model_extra or {}).items() if value is not None}
    written = json.dumps(rest, sort_keys=True, default=str) if rest else ""
    return Step(stage.model, length, written)


def _front(trials: Sequence[Trial], metric: Definition) -> list[Trial]:
    """Measured trials that no other beats at no more MACs."""
    ranks = [(trial.macs or 0, -metric.rank(metric.value(trial.metrics) or 0.0), trial) for trial in trials]
    found: list[tuple[float, Trial]] = []
    for _, behind, trial in sorted(ranks, key=lambda entry: entry[:2]):
        if not found or behind < found[-1][0]:
            found.append((behind, trial))
    return [trial for _, trial in found]
