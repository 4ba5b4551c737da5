"""One line on stderr that counts: rewritten in place on a terminal, printed at a low rate elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from raychain.errors import one_line

LIVE_EVERY_S, PLAIN_EVERY_S = 0.2, 10.0


class CountingLine:
    """Use as a context manager; the line goes away at the end on a terminal."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._live = sys.stderr.isatty()
        self._shown = time.monotonic() if not self._live else 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, done: int, total: int, note: str = "") -> None:
        """Shows `done` of `total`, unless the line was shown a moment ago."""
        now = time.monotonic()
        if now - self._shown < (LIVE_EVERY_S if self._live else PLAIN_EVERY_S):
            return
        self._shown = now
        line = f"{self.what}: {done:,} of {total:,}{', ' if note else ''}{note}"
        line = one_line(line)
        print(f"\r\x1b[K{line}" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)
