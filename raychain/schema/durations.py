"""Lengths of training: one number with one unit, converted in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

UNITS = {"step": "steps", "sample": "samples", "epoch": "epochs", "percent": "%", "%": "%"}
LONGEST = 1e15
"""Steps, samples, epochs, percent or seconds: what is longer is a slip."""
SECONDS = {"s": 1, "second": 1, "minute": 60, "min": 60, "hour": 3600, "h": 3600}
_LENGTH = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]*)\s*")


@dataclass(frozen=True)
class Duration:
    """An amount in `steps`, `samples`, `epochs` or `%` of the stage."""

    amount: float
    unit: str

    def steps(self, *, epoch_samples: int, global_batch: int, stage_steps: int = 0) -> int:
        """Optimiser steps, rounded to the nearest. Epochs are passes over `epoch_samples`; `%` is of `stage_steps`."""
        match self.unit:
            case "steps":
                exact = self.amount
            case "samples":
                exact = self.amount / global_batch
            case "epochs":
                exact = self.amount * epoch_samples / global_batch
            case _:
                exact = self.amount / 100 * stage_steps
        return round(exact)

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} {self.unit}"


def parse_duration(value: Any, *, default_unit: str | None = None, percent: bool = False) -> Duration:
    """`"1000 steps"`, `"3 epochs"`, `"1e6 samples"`, and `"10 %"` where `percent` is allowed.

    Raises ValueError for an unknown unit, two units, a missing unit without `default_unit`, or an amount below zero.
    """
    allowed = 'a number and one unit: "N steps", "N samples" or "N epochs"' + (' or "N %"' if percent else "")
    if isinstance(value, Duration):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"allowed is {allowed}")
    found = _LENGTH.fullmatch(str(value))
    if not found:
        raise ValueError(f"allowed is {allowed}")
    if float(found[1]) > LONGEST:
        raise ValueError(f"allowed is {allowed}, of at most {LONGEST:g}")
    word = found[2].lower()
    unit = default_unit if not word else UNITS.get(word) or UNITS.get(word.removesuffix("s"))
    if unit is None or (unit == "%" and not percent):
        raise ValueError(f"allowed is {allowed}")
    return Duration(float(found[1]), unit)


def parse_interval(value: Any) -> Duration:
    """How often: `"500 steps"` or a time, `"30 seconds"`, `"5 minutes"`, `"1 hour"` (unit `s` in the result)."""
    if isinstance(value, Duration):
        return value
    found = _LENGTH.fullmatch(str(value))
    word = found[2].lower() if found else ""
    seconds = SECONDS.get(word) or SECONDS.get(word.removesuffix("s"))
    if not found or not 0 < float(found[1]) <= LONGEST or (seconds is None and word.removesuffix("s") != "step"):
        raise ValueError('allowed is "N steps", "N seconds", "N minutes" or "N hours", above zero')
    amount = float(found[1])
    return Duration(amount, "steps") if seconds is None else Duration(amount * seconds, "s")


def parse_bytes(value: Any) -> int:
    """`"200GiB"`, `"500 MB"`, or a number of bytes."""
    powers = {"": 1} | {
        f"{p}{b}": base**i for i, p in enumerate("KMGT", 1) for b, base in (("B", 1000), ("iB", 1024), ("", 1024))
    }
    scale = {k.lower(): v for k, v in powers.items()} | {"b": 1}
    found = _LENGTH.fullmatch(str(value))
    size = min(float(found[1]) * scale.get(found[2].lower(), 0), 2**63) if found else 0
    if not 1 <= size < 2**63:
        raise ValueError('allowed is a size such as "200GiB" or "500MB"')
    return int(size)


def _above_zero(length: Duration) -> Duration:
    if length.amount <= 0:
        raise ValueError("allowed is a length above zero")
    return length


_text = PlainSerializer(str, return_type=str)
_schema = WithJsonSchema({"type": "string"})
Epochs = Annotated[
    Duration, BeforeValidator(lambda v: _above_zero(parse_duration(v, default_unit="epochs"))), _text, _schema
]
Warmup = Annotated[Duration, BeforeValidator(lambda v: parse_duration(v, percent=True)), _text, _schema]
Horizon = Annotated[Duration, BeforeValidator(lambda v: _above_zero(parse_duration(v, percent=True))), _text, _schema]
Every = Annotated[Duration, BeforeValidator(lambda v: _above_zero(parse_duration(v))), _text, _schema]
Interval = Annotated[Duration, BeforeValidator(parse_interval), _text, _schema]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
