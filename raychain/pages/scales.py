"""Scales of charts: ticks that people like, and how quantities on them are written. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raychain.core.wording import clock

TIME_STEPS = (
    0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800,
    3600, 7200, 10800, 21600, 43200, 86400, 172800, 432000, 864000, 2592000,
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` onto pixels from `start` to `end`; logarithmic where `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, 1e-300))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten) from `low` to `high`, about so many."""
    if not high > low:
        return [low]
    raw = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, first + 2 * about + 20) if n * step <= high + step * 1e-9]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`; only the powers over more than three decades."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    return [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]


def time_ticks(length: float, about: int) -> list[float]:
    """Seconds from 0 to `length` in steps of clocks and calendars."""
    step = next((s for s in TIME_STEPS if length / s <= about), 10.0 * TIME_STEPS[-1])
    return [n * step for n in range(math.floor(length / step + 1e-9) + 1)][:200]


def around(low: float, high: float, *, zero: bool = False) -> tuple[float, float]:
    """Ends of an axis for values from `low` to `high`: a little more room, or from zero."""
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return (0.0 if zero else low - room), high + room


def short(value: float, *, si: bool = False) -> str:
    """A tick: `0.5`, `20`, `1,500`; with an SI prefix (`2 T`) where `si`."""
    if si:
        power = 0 if abs(value) < 1000 else min(int(math.log10(abs(value)) / 3 + 1e-9), 8)
        return f"{value / 1000**power:.4g} {['', 'K', 'M', 'G', 'T', 'P', 'E', 'Z', 'Y'][power]}".strip()
    return f"{value:,.6g}" if abs(value) < 1e6 else short(value, si=True)


def moment(seconds: float, step: float = 1.0) -> str:
    """A time on an axis: `0:40`, `1:02:03`, `3 d`, `0.5 s` for steps below a second."""
    if step < 1:
        return f"{seconds:g} s"
    if step >= 86400:
        return f"{seconds / 86400:g} d"
    return clock(seconds)


def span(seconds: float) -> str:
    """A short length of time: `14 ms`, `0.4 s`, `25 s`, `3:10`, `2:05:00`."""
    if seconds < 0.095:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return clock(seconds)
