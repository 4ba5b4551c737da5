"""Settings that Ray takes from environment variables alone, set while they are needed."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping

_lock = threading.Lock()
_users: Counter[str] = Counter()
"""How many hold each variable that `environment` has set."""


@contextlib.contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Sets the variables that have no value, until the last of the threads that use this is done with them."""
    with _lock:
        mine = [name for name in settings if _users[name] or name not in os.environ]
        _users.update(mine)
        os.environ.update({name: settings[name] for name in mine})
    try:
        yield
    finally:
        with _lock:
            _users.subtract(mine)
            for name in mine:
                if not _users[name]:
                    os.environ.pop(name, None)
