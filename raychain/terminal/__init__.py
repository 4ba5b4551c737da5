"""Text on its way out of the process: what comes from data, files and errors is shown and never obeyed.

Printing cannot fail either: characters that the stream's encoding lacks are replaced, and a stream that nobody reads
any more, or that is full, loses the text and not the run.
"""

from __future__ import annotations

import codecs
import errno
import io
import logging
import os
import select
import sys
from typing import Any, TextIO

from raychain.errors import RunFailed, printable, without_secrets

PLAIN = {"–": "-", "—": "-", "─": "-", "━": "-", "·": "*", "×": "x", "→": "->", "★": "*", "…": "..."}
"""What raychain writes itself, in ASCII, for streams of other encodings; other characters become escapes."""
ERRORS = "raychain"


def say(text: str, file: TextIO | None = None) -> None:
    """Prints `text` as lines on stderr, or on `file`, with escapes for what a terminal would obey."""
    print(printable(text), file=file or sys.stderr, flush=True)


def guard_streams() -> None:
    """Makes stdout and stderr such that writing to them raises nothing; called once, where a program starts."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started the program
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - for good
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            setattr(sys, name, _patient(stream))


def delivered() -> None:
    """Raises RunFailed where stdout did not take what was printed, for commands that have no other product.

    A reader that went away, as `head` does, had what it wanted.
    """
    sys.stdout.flush()
    failure = _failure()
    if failure:
        raise RunFailed(f"stdout cannot be written: {failure.strerror}")


def report_lost() -> None:
    """Says so on stderr where stdout did not take what was printed."""
    sys.stdout.flush()
    failure = _failure()
    if failure:
        say(f"raychain: warning: stdout cannot be written: {failure.strerror}")


class LogLines(logging.Handler):
    """Takes the secrets of addresses out of raychain's messages, before other handlers see them, and shows warnings on
    stderr where there are none, as `logging` would, but escaped."""

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = without_secrets(record.getMessage()), None
        if record.levelno < logging.WARNING:
            return
        if not logging.getLogger().handlers and logging.getLogger("raychain").handlers == [self]:
            say(record.getMessage())


class _Patient(io.FileIO):
    """A descriptor whose first failure is kept, after which everything written is dropped."""

    failure: OSError | None = None

    def write(self, content: Any, /) -> int:
        left = memoryview(content)
        try:
            while left and self.failure is None:
                written = super().write(left)
                left = left[written or 0 :]
                if written is None:
                    select.select([], [self], [])  # somebody made the descriptor non-blocking
        except OSError as error:
            self.failure = error
        return len(content)


def _patient(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    raw = _Patient(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # as Python does with -u
        encoding=stream.encoding,
        errors=ERRORS,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _failure() -> OSError | None:
    """Why stdout failed, unless its reader went away."""
    buffer = getattr(sys.stdout, "buffer", None)
    failure: OSError | None = getattr(getattr(buffer, "raw", buffer), "failure", None)
    return None if failure is None or failure.errno == errno.EPIPE else failure


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: readable ASCII in place of characters that cannot be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("unicode_escape").decode() for c in missing), error.end


codecs.register_error(ERRORS, _replaced)
