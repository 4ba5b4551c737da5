"""The last resort: an error that nobody foresaw becomes three lines and a file that holds all that a report needs."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
import traceback
from pathlib import Path

DEBUG = "RAYCHAIN_DEBUG"
"""Set to 1: tracebacks are shown."""
ASK = "This is a fault of raychain. Please report it with that file; it holds no credentials that raychain recognises."


def describe(error: BaseException) -> str:
    """What happened, the file that tells more, and a request to report it: three lines, for standard error.

    Where no file can be written, and with RAYCHAIN_DEBUG=1 or --verbose, the traceback stands before them.
    """
    text = _document(error)
    kept = _keep(text)
    what = f"raychain: unexpected error: {_one_line(error)}"
    where = f"  traceback, versions and command line: {kept or 'above, as no file can be written'}"
    shown = kept is None or os.environ.get(DEBUG) == "1" or "--verbose" in sys.argv
    return "\n".join([*([text] if shown else []), what, where, f"  {ASK}"])


def keep(error: BaseException) -> str | None:
    """The new file that holds the traceback, versions and the command line; None where none can be written."""
    return _keep(_document(error))


def _keep(text: str) -> str | None:
    """The new file that holds `text`, in the current folder or else the one for temporary files."""
    name = f"raychain-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (Path.cwd, lambda: Path(tempfile.gettempdir())):
        try:
            path = folder() / name
            with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except (OSError, RecursionError, MemoryError):
            continue
        return str(path)
    return None


def _document(error: BaseException) -> str:
    from raychain.core.environment import versions
    from raychain.pages.markup import plain_text

    try:
        lines = traceback.format_exception(error)
    except Exception:  # the error's own `__str__` may be what is broken
        lines = [*traceback.format_tb(error.__traceback__), type(error).__name__]
    found = ", ".join(f"{name} {version or 'missing'}" for name, version in versions().items())
    system = f"Python {platform.python_version()}, {platform.platform()}"
    return plain_text("\n".join([" ".join(map(_shown, sys.argv)), found, system, "", "".join(lines)]))


def _shown(argument: str) -> str:
    return repr(argument) if argument.split() != [argument] else argument


def _one_line(error: BaseException) -> str:
    from raychain.pages.markup import plain_text

    try:
        said = " ".join(str(error).split())
    except Exception:
        said = ""
    text = plain_text(f"{type(error).__name__}{': ' if said else ''}{said}")
    return text if len(text) <= 300 else f"{text[:300]}…"
