"""`pipe:COMMAND` as an address, as webdataset has it: what a shell command prints is the shard.

Nothing tells what a command prints before it has run, so what it was found to print is noted, and held against what it
prints whenever it runs again.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from typing import BinaryIO, cast

from raychain.core.storage import CHUNK, PIPE, is_command
from raychain.errors import InputError

log = logging.getLogger("raychain.data")

_allowed: ContextVar[bool] = ContextVar("commands", default=True)


class UnrunError(InputError):
    """Samples are not known without running a command, and none may run."""


@contextlib.contextmanager
def unexecuted() -> Iterator[None]:
    """Surveys inside run no commands."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def allowed() -> bool:
    """Whether commands may run here."""
    return _allowed.get()


def refused(address: str, where: str) -> InputError:
    """The error of a command where none may stand."""
    return InputError(
        where, address, f"paths and addresses of files; {PIPE} stands in data.train of the experiment's own file alone",
        "name the files that the command reads",
    )  # fmt: skip


def unrun(address: str, where: str) -> UnrunError:
    """The error of a command that was not run yet where none may run."""
    return UnrunError(
        where, address, "shards that were counted before, as no command is run here",
        "give data.samples, or begin the run once, which counts them",
    )  # fmt: skip


def output(address: str) -> BinaryIO:
    """All that a command prints, in a file without a name that is gone when it is closed.

    Raises OSError for a command that fails.
    """
    from webdataset.gopen import gopen  # seconds, as it imports torch

    file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - who asked closes it
    try:
        with gopen(address, bufsize=CHUNK) as stream:
            shutil.copyfileobj(stream, file, CHUNK)
    except Exception as error:  # webdataset's wrapper names the command, and a shell's status
        file.close()
        raise OSError(f"{address} failed: {error}") from None
    file.seek(0)
    return file


def say_they_run(where: str, addresses: list[str]) -> None:
    """Says that commands are run, and which."""
    if commands := [address for address in addresses if is_command(address)]:
        log.warning(
            "%s runs commands of this experiment, as often as their shards are read, on every node: %s%s",
            where, commands[0].removeprefix(PIPE), f", and {len(commands) - 1:,} more" if commands[1:] else "",
        )  # fmt: skip
