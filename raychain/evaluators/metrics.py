"""Metrics: their names, units and directions, and how a search and a report compare and write them. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from raychain.core.json import Json
from raychain.errors import InputError, nearest

Direction = Literal["high", "low"]


class Metric(NamedTuple):
    """A number that an evaluator measures."""

    key: str
    """Name within the evaluator: `top1`."""
    label: str
    """What people read: `top-1`."""
    unit: Literal["%", "nats", "bits", ""]
    best: Direction
    """The direction in which models get better."""
    brief: bool = True
    """Shown where there is room for few metrics."""
    mean: str = ""
    """The mean that it enters, `TYPE/KEY`; absent: that of the evaluators of its type."""


@dataclass(frozen=True)
class Definition:
    """A metric of a run, whose evaluators have names."""

    name: str
    """`imagenet/top1`"""
    label: str
    """`imagenet top-1`"""
    unit: str
    best: Direction
    brief: bool = True
    former: str = ""
    """The name under which files of raychain 0.1 have it: `zero_shot_top1`."""
    kind: str = ""
    """The evaluator's type."""
    mean: str = ""
    """The same field of `Metric`."""

    def value(self, metrics: Mapping[str, Any]) -> float | None:
        """The metric among a record's metrics, under either name; None where it is missing or not finite."""
        found = metrics.get(self.name, metrics.get(self.former) if self.former else None)
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            return None
        return float(found)

    def rank(self, value: float) -> float:
        """A number that is higher for better values."""
        return value if self.best == "high" else -value

    def written(self, value: Any) -> str:
        """The value with its unit: `31.2 %`, `2.85 nats`; `–` where there is none."""
        return f"{self.number(value)} {self.unit}".strip()

    def number(self, value: Any) -> str:
        """The value without its unit: percentages to one decimal, others to three significant digits."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return "–"
        if self.unit == "%":
            return f"{value:.1f}"
        return f"{value:,.{max(2 - math.floor(math.log10(abs(value))), 0)}f}" if value else "0"

    @property
    def tie(self) -> float:
        """The difference that a table does not show."""
        return 0.05 if self.unit == "%" else 0.0005

    @property
    def recorded(self) -> str:
        """The name under which searches compare it: the former one where it has one."""
        return self.former or self.name


ZERO_SHOT_MEAN = "zero_shot/top1"
"""The mean of zero-shot sets: of top-1, and of mean average precision where pictures have several labels."""
ZERO_SHOT = (Metric("top1", "top-1", "%", "high"), Metric("top5", "top-5", "%", "high", brief=False))
MULTILABEL = (Metric("map", "mAP", "%", "high", mean=ZERO_SHOT_MEAN),)
RETRIEVAL = tuple(
    Metric(f"{direction}_r{k}", f"{direction} R@{k}", "%", "high", brief=k == 1)
    for direction in ("i2t", "t2i")
    for k in (1, 5, 10)
)


def define(name: str, kind: str, metrics: Iterable[Metric]) -> tuple[Definition, ...]:
    """The definitions of an evaluator of type `kind` that a run calls `name`.

    `zero_shot` and `retrieval`, called so, keep the names that their metrics had before there were others.
    """
    found = []
    for key, label, unit, best, brief, mean in metrics:
        own, former = f"{name} {label}", ""
        if name == kind == "zero_shot":
            own, former = f"zero-shot {label}", f"zero_shot_{key}"
        elif name == kind == "retrieval":
            own, former = label, key
        found.append(Definition(f"{name}/{key}", own, unit, best, brief, former, kind, mean))
    return tuple(found)


FORMER = (*define("zero_shot", "zero_shot", ZERO_SHOT), *define("retrieval", "retrieval", RETRIEVAL))
"""The metrics of runs whose files define none."""


def find(definitions: Iterable[Definition], name: str, where: str) -> Definition:
    """The definition with this name, or with this former name. Raises InputError, which names `where`."""
    known = {alias: found for found in definitions for alias in (found.name, found.former) if alias}
    if name in known:
        return known[name]
    allowed = f"a metric that is measured: {', '.join(d.name for d in definitions)}" if known else "nothing is measured"
    raise InputError(where, name, allowed, nearest(name, list(known), "name one of these, or add it to evaluate"))


def written_down(definitions: Iterable[Definition]) -> dict[str, Json]:
    """The definitions as run.json and search.json hold them, by name."""
    return {
        found.name: {k: v for k, v in asdict(found).items() if k != "name" and (k, v) != ("mean", "")}
        for found in definitions
    }


def read_back(document: Mapping[str, Any]) -> tuple[Definition, ...]:
    """The definitions in a run.json or search.json; those of raychain 0.1 where it has none that can be read."""
    found = []
    held = document.get("metrics")
    for name, fields in held.items() if isinstance(held, Mapping) else ():
        if isinstance(fields, Mapping):
            text = {k: str(fields.get(k) or "") for k in ("label", "unit", "former", "kind", "mean")}
            best: Direction = "low" if fields.get("best") == "low" else "high"
            label = text["label"] or str(name)
            found.append(Definition(str(name), label, text["unit"], best, fields.get("brief") is not False,
                                    text["former"], text["kind"], text["mean"]))  # fmt: skip
    return tuple(found) or FORMER


class Mean(NamedTuple):
    """The mean of a metric over evaluators."""

    definition: Definition
    """The definition of any of them; its label says what the mean is of."""
    value: float


def means(definitions: Iterable[Definition], metrics: Mapping[str, Any]) -> list[Mean]:
    """The means over evaluators of a type, of which there must be two or more, all measured; for brief metrics.

    Where a metric enters the mean of another one, the label counts both: `mean of 38 × zero shot (37 top1, 1 map)`.
    """
    groups: dict[str, list[Definition]] = {}
    for definition in definitions:
        if definition.brief and definition.kind:
            groups.setdefault(definition.mean or f"{definition.kind}/{_key(definition)}", []).append(definition)
    found = []
    for name, group in groups.items():
        values = [value for d in group if (value := d.value(metrics)) is not None]
        if len(group) > 1 and len(values) == len(group):
            kind, _, key = name.partition("/")
            keys = Counter(map(_key, group))
            of = key if len(keys) == 1 else f"({', '.join(f'{n} {key}' for key, n in keys.items())})"
            label = f"mean of {len(group)} × {kind.replace('_', ' ')} {of}"
            found.append(Mean(replace(group[0], name=f"mean/{name}", label=label, former=""),
                              sum(values) / len(values)))  # fmt: skip
    return found


def _key(definition: Definition) -> str:
    return definition.name.partition("/")[2]
