"""What of search.json can be shown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from raychain.core.json import Json
from raychain.evaluators.metrics import Definition, read_back
from raychain.pages.loading import amount, mapping, mappings, number, numbers


class Step(NamedTuple):
    """A stage of a trial's chain; what else it was trained with distinguishes it too."""

    model: str
    length: str
    rest: str
    key: str = ""
    """Its content address, where search.json gives it: stages of one key are one."""


class Trial(NamedTuple):
    """A trial of search.json."""

    number: int
    chain: tuple[Step, ...]
    macs: float | None
    metrics: dict[str, float]
    status: str
    reason: str
    """Why it failed or was stopped early; else empty."""
    rest: Json


class Search(NamedTuple):
    """search.json, read."""

    trials: list[Trial]
    front: list[Trial]
    best: Trial | None
    metric: Definition
    """What trials are judged by."""
    baseline: Json
    comparisons: list[Json]
    requested: float | None
    trained: float | None
    measures: list[Definition]
    """The metrics that matter most."""

    def value(self, trial: Trial) -> float | None:
        """What the trial is judged by."""
        return self.metric.value(trial.metrics)

    def rank(self, trial: Trial) -> float:
        """Higher for better trials; those without the metric come last."""
        value = self.value(trial)
        return -math.inf if value is None else self.metric.rank(value)


KNOWN = {
    "chain", "macs", "metrics", "status", "id", "trial", "index", "number", "key", "keys", "params", "reason",
    "reached",
}  # fmt: skip


def parse(document: Json) -> Search:
    """What of search.json can be shown. Trials in `pareto` and `best` may stand as indices or as the trials are."""
    raw = mappings(document.get("trials"))
    trials = [_trial(i, entry) for i, entry in enumerate(raw)]
    definitions = read_back(document)
    metric = _judged_by(definitions, document.get("metric"), trials)
    best = _find(document.get("best"), raw, trials)
    listed = document.get("pareto")
    front = [t for t in (_find(item, raw, trials) for item in listed) if t] if isinstance(listed, list) else []
    measured = [t for t in trials if t.macs and metric.value(t.metrics) is not None]
    front = sorted({t.number: t for t in front if t in measured}.values(), key=lambda t: t.macs or 0) or _front(
        measured, metric
    )
    if best is None and measured:
        best = max(measured, key=lambda t: metric.rank(metric.value(t.metrics) or 0.0))
    requested, trained = (_total(document.get(f"stage_epochs_{key}")) for key in ("requested", "trained"))
    baseline, comparisons = mapping(document.get("baseline")), mappings(document.get("comparisons"))
    measures = [definition for definition in definitions if definition.brief]
    return Search(trials, front, best, metric, baseline, comparisons, requested, trained, measures)


def _judged_by(definitions: Sequence[Definition], name: Any, trials: Sequence[Trial]) -> Definition:
    """The metric that the search names, else the first one that a trial has."""
    if isinstance(name, str) and name:
        found = next((d for d in definitions if name in (d.name, d.former)), None)
        return found or Definition(name, name, "%", "high")
    had = (d for d in definitions if any(d.value(trial.metrics) is not None for trial in trials))
    other = next((key for trial in trials for key in trial.metrics), None)
    fallback = Definition(other, other, "%", "high") if other else definitions[0]
    return next(had, fallback)


def _trial(index: int, entry: Json) -> Trial:
    chain = entry.get("chain")
    steps = tuple(_step(stage) for stage in chain[:16]) if isinstance(chain, list) else ()
    keys = entry.get("keys")
    if isinstance(keys, list) and len(keys) == len(steps):
        steps = tuple(step._replace(key=str(key)) for step, key in zip(steps, keys, strict=True))
    told = ("chain", "length", "first", "rules")  # the chain says these
    params = {str(k): v for k, v in mapping(entry.get("params")).items() if not isinstance(v, dict | list)}
    settings = {k: v for k, v in params.items() if k not in told and not k.startswith("grown.")}
    rest = {str(k): v for k, v in entry.items() if k not in KNOWN} | settings
    status, numbered = str(entry.get("status") or ""), number(entry.get("number"))
    return Trial(
        index if numbered is None else int(numbered),
        steps,
        amount(entry.get("macs")),
        numbers(entry.get("metrics")),
        status,
        str(entry.get("reason") or ""),
        rest,
    )


def _step(stage: Any) -> Step:
    if not isinstance(stage, dict):
        return Step(str(stage), "", "")
    epochs = stage.get("epochs")
    length = f"{epochs:.3g} epochs" if number(epochs) is not None else str(epochs or "")
    length = length[:-1] if length == "1 epochs" else length
    rest = {k: v for k, v in stage.items() if k not in ("model", "epochs") and v is not None}
    return Step(str(stage.get("model", "?")), length, json.dumps(rest, sort_keys=True, default=str) if rest else "")


def _find(item: Any, raw: Sequence[Json], trials: Sequence[Trial]) -> Trial | None:
    if isinstance(item, int) and not isinstance(item, bool):
        return trials[item] if 0 <= item < len(trials) else None
    for key in ("id", "trial", "index", "number", "key"):
        wanted = item.get(key) if isinstance(item, dict) else item
        found = next((t for t, r in zip(trials, raw, strict=True) if wanted is not None and r.get(key) == wanted), None)
        if found:
            return found
    if isinstance(item, dict):
        return next((t for t, r in zip(trials, raw, strict=True) if r.get("chain") == item.get("chain")
                     and r.get("macs") == item.get("macs", r.get("macs"))), None)  # fmt: skip
    return None


def _total(value: Any) -> float | None:
    """A number, or the sum of the numbers in a list or an object."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return sum(n for n in map(number, inner) if n is not None)
    return number(value)


def _front(trials: Sequence[Trial], metric: Definition) -> list[Trial]:
    """Measured trials that no other beats at no more MACs."""
    ranks = [(trial.macs or 0, -metric.rank(metric.value(trial.metrics) or 0.0), trial) for trial in trials]
    found: list[tuple[float, Trial]] = []
    for _, behind, trial in sorted(ranks, key=lambda entry: entry[:2]):
        if not found or behind < found[-1][0]:
            found.append((behind, trial))
    return [trial for _, trial in found]
