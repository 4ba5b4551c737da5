"""How numbers are written for people, in progress and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

MISSING = "–"


def named_by(checkpoint: str) -> str:
    """What people call a checkpoint: the last part of its address, without options."""
    return checkpoint.partition("?")[0].rstrip("/").rpartition("/")[2] or checkpoint


def uncounted(stages: Iterable[Mapping[str, Any]]) -> list[str]:
    """The checkpoints in a chain whose training its totals do not count, a sentence each. `stages` are entries of a
    plan or a run, with `model`, `epochs` and, where there is one, the `origin`: {`checkpoint`, `model`}.
    """
    found = []
    for stage in stages:
        origin, model = stage.get("origin"), stage.get("model")
        if isinstance(origin, Mapping):
            what = f"{model} starts from {origin.get('model')}" if stage.get("epochs") else str(model)
            name = named_by(str(origin.get("checkpoint")))
            found.append(f"{what} given: {name}, its own training is not in the totals")
    return found


def several(count: float, thing: str, form: str = ",") -> str:
    """`1 shard`, `1,200 shards`; the number as `form` writes it: `0.5 epochs` with "g"."""
    written = format(count, form)
    return f"{written} {thing}{'' if written == '1' else 's'}"


def number(value: Any, digits: int = 3) -> str:
    """`value` to at least `digits` significant digits: `0.31`, `86.2`, `12,345`; `–` where there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"


def percent(value: Any) -> str:
    """A percentage with one decimal, without the sign."""
    return f"{value:.1f}" if isinstance(value, int | float) and math.isfinite(value) else MISSING


def macs(value: Any) -> str:
    """Multiply-accumulates with an SI prefix: `1.20 T`."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return MISSING
    prefixes = ["", "K", "M", "G", "T", "P", "E", "Z", "Y"]
    power = 0 if abs(value) < 1000 else min(int(math.log10(abs(value)) / 3), len(prefixes) - 1)
    return f"{number(value / 1000**power)} {prefixes[power]}".strip()


def clock(seconds: Any) -> str:
    """A length of time: `0:42`, `1:02:03`."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def about(seconds: float) -> str:
    """A length of time in one unit: `23 seconds`, `12 minutes`, `5.8 hours`, `12.4 days`."""
    for unit, length, least in (("days", 86400, 3), ("hours", 3600, 1), ("minutes", 60, 1)):
        if seconds >= least * length:
            return f"{number(seconds / length, 2)} {unit}"
    return f"{number(seconds, 2)} seconds"
