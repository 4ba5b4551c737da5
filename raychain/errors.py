"""Errors that reach the person who typed the command."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


class InputError(Exception):
    """The input is wrong (exit status 2): where it stands, what was given, what is allowed, how to fix it."""

    def __init__(self, where: str, given: object, allowed: str, fix: str) -> None:
        super().__init__(where, str(given), allowed, fix)  # all four, so that it survives pickling between processes

    def __str__(self) -> str:
        where, given, allowed, fix = self.args
        return f"{where}\n  given    {given}\n  allowed  {allowed}\n  fix      {fix}"


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


def nearest(word: str, known: Sequence[str], default: str) -> str:
    """`did you mean X?` for the entry of `known` nearest to `word`, else `default`."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else default
