"""Signals that ask to stop: SIGINT (Ctrl-C), SIGTERM, and SIGHUP of a terminal that is closed.

A process raises KeyboardInterrupt for them once at most. What comes after it is cleaning up: records are written and
Ray is ended, which further signals must not cut short.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ClassVar, NoReturn

ASKED = 130
"""Exit status of a program that was asked to stop."""
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _State:
    """What this process has been asked so far."""

    interrupted = False
    """KeyboardInterrupt was raised."""
    held = 0
    """Blocks under way that must not be cut short."""
    pending = False
    """A signal came while such a block was under way."""
    save: Callable[[], None] | None = None
    """What the first signal calls while there is something to be saved."""
    last: ClassVar[list[Callable[[], None]]] = []
    """What is left to do when everything else is done."""


def early() -> None:
    """Until `take_over`, a signal ends the process at once: it is still importing and has nothing to clean up."""
    _install(_leave)


def take_over() -> None:
    """From now on the first signal raises KeyboardInterrupt in the main thread, and later ones are ignored."""
    _State.interrupted, _State.pending = False, False
    _install(_handle)


def interrupted() -> bool:
    """Whether a signal has raised KeyboardInterrupt."""
    return _State.interrupted


def at_the_very_end(action: Callable[[], None]) -> None:
    """`leave` calls `action` and ends the process there and then; without `leave` it is called at exit."""
    _State.last.append(action)
    atexit.register(action)


def leave(status: int) -> NoReturn:
    """Ends the program; signals change nothing any more."""
    _install(_nothing)
    if _State.last:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        for action in _State.last:
            action()
        os._exit(status)
    sys.exit(status)


@contextlib.contextmanager
def saving(save: Callable[[], None]) -> Iterator[None]:
    """Within, the first signal calls `save`, which returns at once; only the second raises KeyboardInterrupt."""
    if not _in_main_thread():
        yield
        return
    _State.save = save
    before = _install(_handle)
    try:
        yield
    finally:
        _State.save = None
        _restore(before)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A block that no signal cuts short; for one that came meanwhile `check` and `released` raise KeyboardInterrupt."""
    if not _in_main_thread():
        yield
        return
    before = _install(_handle)
    _State.held += 1
    try:
        yield
    finally:
        _State.held -= 1
        _restore(before)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Holds signals back as `held` does; one that came meanwhile is too late, as the block has told the outcome."""
    with held():
        yield
        if _in_main_thread():
            _State.pending = False


@contextlib.contextmanager
def released() -> Iterator[None]:
    """A block within `held` in which signals count again; it begins with `check`."""
    if not _in_main_thread():
        yield
        return
    before, _State.held = _State.held, 0
    try:
        check()
        yield
    finally:
        _State.held = before


def check() -> None:
    """Raises KeyboardInterrupt for a signal that came while signals were held."""
    if _in_main_thread() and _State.pending and not _State.held:
        _interrupt()


def renew() -> None:
    """Makes Python's handlers count again where a library in C has put others, or none, in their place."""
    for number in NUMBERS if _in_main_thread() else ():
        if (handler := signal.getsignal(number)) is not None:
            signal.signal(number, handler)


def _handle(_: int, __: FrameType | None) -> None:
    if _State.interrupted:
        return
    if _State.save is not None:
        save, _State.save = _State.save, None
        save()
    elif _State.held:
        _State.pending = True
    else:
        _interrupt()


def _interrupt() -> None:
    _State.interrupted, _State.pending = True, False
    raise KeyboardInterrupt


def _leave(_: int, __: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"raychain: interrupted.\n")
    os._exit(ASKED)


def _nothing(_: int, __: FrameType | None) -> None:
    """Ignores the signal, in this process alone: what it starts would inherit SIG_IGN."""


Handlers = dict[signal.Signals, Any]


def _install(handler: Callable[[int, FrameType | None], None]) -> Handlers:
    """Sets the handler and returns the ones before; a SIGHUP that `nohup` has ignored stays ignored."""
    if not _in_main_thread():
        return {}
    kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return {n: signal.signal(n, handler) for n in NUMBERS if not (kept and n == signal.SIGHUP)}


def _restore(handlers: Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
