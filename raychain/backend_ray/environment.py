"""Settings that Ray takes from environment variables alone: changed for as long as they are needed."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping

_lock = threading.Lock()
_users: Counter[str] = Counter()
"""How many threads need each variable that `environment` has set."""
_before: dict[str, str | None] = {}
"""What those variables were."""


@contextlib.contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Sets the variables that are absent or empty, until the last of the threads that use this is done with them."""
    with _lock:
        mine = [name for name in settings if _users[name] or not os.environ.get(name)]
        for name in mine:
            if not _users[name]:
                _before[name] = os.environ.get(name)
                os.environ[name] = settings[name]
            _users[name] += 1
    try:
        yield
    finally:
        with _lock:
            for name in mine:
                _users[name] -= 1
                if not _users[name]:
                    _restore(name, _before.pop(name))


@contextlib.contextmanager
def absent(name: str) -> Iterator[None]:
    """Takes a variable away; afterwards it is what it was."""
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        _restore(name, before)


@contextlib.contextmanager
def changes() -> Iterator[dict[str, str | None]]:
    """Yields a dict that has, when the block is done, what the variables were that it has set or changed."""
    before, found = dict(os.environ), dict[str, str | None]()
    try:
        yield found
    finally:
        found |= {name: before.get(name) for name, value in os.environ.items() if before.get(name) != value}


def restore(before: Mapping[str, str | None]) -> None:
    """Sets variables back; None: it is absent."""
    for name, value in before.items():
        _restore(name, value)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
