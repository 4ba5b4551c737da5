"""What Tune pickles of a search, and what becomes of it when a search goes on.

Tune writes searcher, scheduler, stopper and callbacks into `tuner.pkl` and takes them from there when an experiment is
restored, with the settings and the code of the first call. Here each is pickled as its name alone, and found again
among those that the present call has made. Their state Tune keeps and restores apart from that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

_LIVE: dict[str, object] = {}


class DamagedStateError(Exception):
    """What Tune has saved of a search cannot be used."""


def find(name: str) -> Any:
    """The object of this name in this process; None where no search is at work, as for who only reads the results."""
    return _LIVE.get(name)


class Live:
    """Found again by its name instead of being copied."""

    live_name: str | None = None

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str | None]]:
        return find, (self.live_name,)


@contextlib.contextmanager
def live(search: str, *parts: Live) -> Iterator[None]:
    """Within, these can be found as parts of a search."""
    for part in parts:
        part.live_name = f"{search}#{type(part).__name__.removeprefix('Halving').removeprefix('Chain')}"
        _LIVE[part.live_name] = part
    try:
        yield
    finally:
        for part in parts:
            _LIVE.pop(str(part.live_name), None)
