"""One line of what was looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from raychain.errors import InputError, one_line

GIB = 2**30


class Finding(NamedTuple):
    """What was found of one thing."""

    name: str
    state: Literal["ok", "warning", "problem"]
    said: str
    fix: str = ""
    """What to do about it; empty where nothing is to be done."""


def looked_at(name: str, look: Callable[[], Finding]) -> Finding:
    """The finding, be it that looking failed."""
    try:
        return look()
    except InputError as error:
        _, given, allowed, fix, *_ = error.args
        return Finding(name, "problem", one_line(f"{given}: needed is {allowed}"), one_line(str(fix)))
    except Exception as error:
        return Finding(name, "problem", one_line(f"{type(error).__name__}: {error}"), "see the message")


def size(amount: float) -> str:
    """Bytes in GiB."""
    return f"{amount / GIB:,.1f} GiB"
