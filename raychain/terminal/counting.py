"""One line on stderr that counts: rewritten in place on a terminal, printed at a low rate elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Self

from raychain.core.wording import clock
from raychain.errors import one_line

LIVE_EVERY_S, PLAIN_EVERY_S = 0.2, 10.0
SILENT_S = 9.0
"""After which somebody wonders."""


class CountingLine:
    """Use as a context manager; the line goes away at the end on a terminal.

    While nothing is shown for a while, the last line is repeated with the time since, so that nobody waits in silence.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._live = sys.stderr.isatty()
        self._began = time.monotonic()
        self._shown = self._began if not self._live else 0.0
        self._line = f"{what}: none yet"
        self._over, self._lock = threading.Event(), threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self._remind, name="counting", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._over.set()
            if self._live:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, done: int, total: int, note: str = "") -> None:
        """Shows `done` of `total`, unless the line was shown a moment ago."""
        self._line = one_line(f"{self.what}: {done:,} of {total:,}{', ' if note else ''}{note}")
        if time.monotonic() - self._shown >= (LIVE_EVERY_S if self._live else PLAIN_EVERY_S):
            self._print(self._line)

    def _remind(self) -> None:
        while not self._over.wait(SILENT_S):
            if time.monotonic() - self._shown >= SILENT_S:
                self._print(f"{self._line} ({clock(time.monotonic() - self._began)})")

    def _print(self, line: str) -> None:
        with self._lock:
            if not self._over.is_set():
                self._shown = time.monotonic()
                text, end = (f"\r\x1b[K{line}", "") if self._live else (line, "\n")
                print(text, end=end, file=sys.stderr, flush=True)
