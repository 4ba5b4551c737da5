"""Errors that reach the person who typed the command."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from difflib import get_close_matches

LONGEST = 1000
"""Characters that are shown of what was given."""
# Addresses may carry credentials (`s3://key:secret@bucket`, `?secret_key=…`), and all that is written is handed on. A
# secret that was not escaped may hold slashes; digits behind a colon are a port.
_USER = re.compile(r"(:/{1,2})(?:[^/\s@:'\"?]{0,300}:(?!\d+[/?])[^\s'\"]{0,300}|[^/\s'\"?]{0,300})@")
_OPTION = re.compile(
    r"(?i)(?<=[?&;])([\w.-]{0,40}(?:secret|token|passw|credential|key|sig)[\w.-]{0,40}=)"
    r"(?:(?![,:;.)]+(?:\s|$))[^&\s'\"<>])+"
)


class InputError(Exception):
    """The input is wrong (exit status 2): where it stands, what was given, what is allowed, how to fix it.

    `more` are other errors in the same input.
    """

    def __init__(self, where: str, given: object, allowed: str, fix: str, *more: InputError) -> None:
        super().__init__(where, str(given), allowed, fix, *more)  # all, so that it survives pickling between processes

    def __str__(self) -> str:
        where, given, allowed, fix, *more = self.args
        first = f"{_line(where)}\n  given    {_line(given)}\n  allowed  {_joined(allowed)}\n  fix      {_joined(fix)}"
        return "\n".join([first, *map(str, more)])


class RunFailed(Exception):  # noqa: N818 - the name says what happened
    """The run stopped with an error (exit status 1); what was trained is kept.

    `overrides` are "dotted.key=value" with which it would go on, where that is known.
    """

    def __init__(self, message: str, overrides: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.overrides = tuple(overrides)


class Diverged(FloatingPointError):  # noqa: N818 - the name says what happened
    """Training met numbers that are not finite: in which stage, and of which step its last good state is."""

    def __init__(self, message: str, stage: int, step: int) -> None:
        super().__init__(message, stage, step)  # all three, so that it survives pickling between processes
        self.stage, self.step = stage, step

    def __str__(self) -> str:
        return str(self.args[0])


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """The user or the cluster stopped the run (exit status 130); what was trained is kept."""


def without_secrets(text: str) -> str:
    """`text` with `…` for the users and passwords of addresses, and for the values of their options that are secret."""
    return _OPTION.sub(r"\1…", _USER.sub(r"\1…@", text))


def printable(text: str) -> str:
    """`text` without secrets, and with escapes such as `\\x1b` for what a terminal would obey and nobody would see.

    These are control, format and direction characters and halves of surrogate pairs. Line ends and tabs stay.
    """
    text = without_secrets(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or not _hidden(c) else _escape(c) for c in text)


def one_line(text: str) -> str:
    """`printable`, with escapes for line ends too: no name can begin a line."""
    return printable(text).replace("\n", "\\n")


def nearest(word: str, known: Sequence[str], default: str) -> str:
    """`did you mean X?` for the entry of `known` nearest to `word`, else `default`."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else default


def _hidden(character: str) -> bool:
    return character not in "\n\t\u200c\u200d" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _line(given: object) -> str:
    text = without_secrets(str(given))  # all of it: a part would not show where a secret ends
    return one_line(text if len(text) <= LONGEST else text[:LONGEST] + "…")


def _joined(text: str) -> str:
    """Text of several lines, as libraries' errors have, in one."""
    return one_line(" ".join(line.strip() for line in str(text).splitlines()))
