"""A command function as a program, with raychain's exit statuses."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import typer

from raychain import signals
from raychain.errors import InputError, Interrupted, RunFailed
from raychain.terminal import guard_streams, report_lost, say
from raychain.unexpected import describe

KEPT = "What is done is kept; the same command continues."


def main(command: Any, name: str) -> None:
    """Runs a command function as a program, with raychain's exit statuses."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name)(command)
    guarded(app)


def guarded(app: Any, arguments: Sequence[str] | None = None) -> None:
    """Calls a Typer app, by default with the process's arguments, and exits; errors become one message and a status:
    1 run failed, 2 wrong input, 130 interrupted.
    """
    signals.take_over()
    guard_streams()
    try:
        status = _status(partial(app, arguments, prog_name="raychain") if arguments is not None else app)
    except KeyboardInterrupt:  # while an outcome was being told
        status = signals.ASKED
    signals.leave(status)


def _status(app: Any) -> int:
    try:
        app()
    except InputError as error:
        return _told(f"raychain: {error}", 2)
    except RunFailed as error:
        said = str(error).replace("\n", "\n  ")  # no line of an error looks like one of raychain's own
        return _told(f"raychain: the run failed: {said}\n{_way_on(error)}", 1)
    except (Interrupted, KeyboardInterrupt):
        return _told(f"raychain: interrupted. {KEPT}", signals.ASKED)
    except SystemExit as stop:  # Typer's own, also for KeyboardInterrupt
        if signals.interrupted():
            return _told(f"raychain: interrupted. {KEPT}", signals.ASKED)
        if stop.code:
            return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        return _told(describe(error), 1)
    report_lost()
    return 0


def _told(message: str, status: int) -> int:
    say(message)
    return status


def _way_on(error: RunFailed) -> str:
    """What to do about it."""
    if not error.overrides:
        return KEPT
    command = shlex.join([*sys.orig_argv, *(word for override in error.overrides for word in ("--set", override))])
    return f"What is done is kept. To go on with half the learning rate, or any that you put there:\n{command}"


def as_module(name: str, command: str) -> None:
    """Runs `command` for a module of that name in raychain that `python -m` runs, `name` being its `__name__`.

    Raises ImportError where it is imported: as an attribute of raychain the name belongs to a function.
    """
    if name == "__main__":
        import_module("raychain.cli").app([command, *sys.argv[1:]])
    elif name.startswith("raychain."):
        raise ImportError(
            f"{name} is a function: `from raychain import {command}`; its command is `raychain {command}`"
        )
