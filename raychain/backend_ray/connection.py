"""The connection to Ray: a cluster that runs already, or an instance of this machine's own, which ends with the run.

Ray is started and ended in a thread of its own. So no signal cuts short what it does, which would leave processes
behind; it does not replace the handlers of signals; and a start that never ends can be given up.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import secrets
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import ray

from raychain import signals
from raychain.backend_ray import internals
from raychain.backend_ray.address import Cluster, check_answers, cluster
from raychain.backend_ray.environment import absent, changes, environment, restore
from raychain.errors import InputError, RunFailed
from raychain.pages.markup import plain_text
from raychain.training.task import ChainTask, worker_cpus

WARNINGS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Without it Ray warns that it will once leave a process without GPUs those it sees."""
RENEWED_S = 0.005
"""How often handlers of signals are set anew while Ray ends."""
STARTS_S, JOINS_S = 180.0, 60.0
"""How long Ray may take to start on this machine, and to join a cluster that answers."""
ENDS_S = 60.0
"""How long it may take to end, which includes a start that is under way."""
MEMORY = 256 * 2**20
"""Bytes of the object store, which holds only the description of the chain."""
LONGEST = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Characters of Ray's folder for temporary files: a socket's path has 107 at most."""
FREE = 64 * 2**20
"""Bytes that have to be free there."""
FILES = 1024
"""Open files that Ray needs at least."""


@contextlib.contextmanager
def session(task: ChainTask, address: str | None, verbose: bool) -> Iterator[None]:
    """A Ray connection: an existing one of this process, the cluster at `address` or RAY_ADDRESS, or a local one.

    Raises InputError or RunFailed, within minutes, where there is none. Nothing of a local one is left afterwards.
    """
    found = cluster(address)
    if ray.is_initialized() or found:
        with joined(address, verbose):
            yield
        return
    with environment(WARNINGS | _token()), _log_as_before(), _opened(_starting(task, _options(verbose))):
        yield


@contextlib.contextmanager
def joined(address: str | None, verbose: bool) -> Iterator[None]:
    """An existing connection of this process, or one to the cluster at `address` or RAY_ADDRESS, which there is.

    Raises InputError, within minutes, where it does not answer.
    """
    if ray.is_initialized():
        yield
        return
    found = cluster(address)
    assert found, "who joins has an address"
    with environment(WARNINGS), _log_as_before(), _opened(_joining(found, _options(verbose))):
        yield


class _Options(TypedDict):
    """What `ray.init` is to say."""

    log_to_driver: bool
    logging_level: int


def _options(verbose: bool) -> _Options:
    return {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}


@contextlib.contextmanager
def _opened(connection: _Connection) -> Iterator[None]:
    try:
        connection.open()
        yield
    finally:
        connection.close()


@contextlib.contextmanager
def _log_as_before() -> Iterator[None]:
    """Within, Ray sets level and format of its log; afterwards they are what they were."""
    log = logging.getLogger("ray")
    level, formatters = log.level, [(handler, handler.formatter) for handler in log.handlers]
    try:
        yield
    finally:
        log.setLevel(level)
        for handler, formatter in formatters:
            handler.setFormatter(formatter)


class _Connection:
    """Ray from `init` on; `refused` makes the error of words that say why there is none."""

    def __init__(self, init: Callable[[], Any], refused: Callable[[str], Exception], limit_s: float) -> None:
        self._init, self._refused, self._limit_s = init, refused, limit_s
        self._error: BaseException | None = None
        self._processes = _Processes()
        self._opened, self._closing, self._closed = threading.Event(), threading.Event(), threading.Event()
        # It lives as long as the connection: what it has started ends with it, by the kernel's hand.
        self._thread = threading.Thread(target=self._work, name="ray", daemon=True)

    def open(self) -> None:
        """Waits until Ray is there. Raises what `refused` makes, or KeyboardInterrupt."""
        self._thread.start()
        if not self._opened.wait(self._limit_s):
            raise self._refused(f"no answer within {self._limit_s:g} s")
        if self._error is not None:
            raise self._refused(reason_of(self._error)) from None

    def close(self) -> None:
        """Ends the connection and what belongs to it. Raises KeyboardInterrupt for a signal that came meanwhile."""
        with signals.held():
            self._closing.set()
            hangs = self._thread.is_alive() and not self._is_closed_within(self._patience())
            if hangs:  # Ray may abort this process when its own ones end, so that has to be the last thing that happens
                atexit.unregister(ray.shutdown)
                signals.at_the_very_end(self._processes.end)
            else:
                self._processes.end()
        signals.check()

    def _is_closed_within(self, seconds: float) -> bool:
        """Whether Ray ends in time. When it does, its C++ part leaves SIGTERM to the kernel, which would end this
        process before its record is written.
        """
        until = time.monotonic() + seconds
        while not (closed := self._closed.wait(RENEWED_S)) and time.monotonic() < until:
            signals.renew()
        signals.renew()
        return closed

    def _patience(self) -> float:
        return ENDS_S if self._opened.is_set() or signals.interrupted() else 1.0

    def _work(self) -> None:
        before: dict[str, str | None] = {}
        try:
            with changes() as before, self._processes.started_by_ray():
                self._init()
        except BaseException as error:
            self._error = error
        self._opened.set()
        self._closing.wait()
        with contextlib.suppress(Exception):
            ray.shutdown()
        restore(before)
        self._closed.set()


class _Processes:
    """What Ray starts on this machine: each of its daemons in a session of its own, with all that come from it.

    So a signal to the group of this process, from a terminal or from `timeout`, reaches this process alone, which has
    the workers save. And whatever is left of a daemon that was killed is known by its session.
    """

    def __init__(self) -> None:
        self._sessions: list[int] = []

    def started_by_ray(self) -> contextlib.AbstractContextManager[None]:
        """Within, Ray's daemons are started so."""
        return internals.daemons_apart(self._sessions.append)

    def end(self) -> None:
        """Kills what is still there."""
        until = time.monotonic() + 10
        while (left := self._members()) and time.monotonic() < until:
            for process in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    def _members(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat") if self._sessions else ():
            with contextlib.suppress(OSError):  # it ended meanwhile
                state, _, _, session = path.read_text(errors="replace").rpartition(")")[2].split()[:4]
                if int(session) in self._sessions and state not in "ZX":
                    found.append(int(path.parent.name))
        return found


def _joining(found: Cluster, options: _Options) -> _Connection:
    check_answers(found)

    def init() -> None:
        with absent("RAY_ADDRESS"):  # of the jobs API perhaps; Ray would take it for the address
            ray.init(address=found.address, **options)

    def refused(reason: str) -> Exception:
        fix = f"start one, correct the address, or give its token (RAY_AUTH_TOKEN_PATH). Ray says: {reason}"
        return InputError(found.where, found.address, "a Ray cluster that answers", fix)

    return _Connection(init, refused, JOINS_S)


def _starting(task: ChainTask, options: _Options) -> _Connection:
    cpus = max(os.cpu_count() or 1, math.ceil(task.experiment.most_workers * worker_cpus(task.experiment)))
    folder = temporary()
    check_open_files()

    def init() -> None:
        # "local": without it Ray joins whatever cluster happens to run on this machine
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=MEMORY,
                 _temp_dir=folder, **options)  # fmt: skip
        internals.start_coordinator()

    def refused(reason: str) -> Exception:
        return RunFailed(f"Ray did not start on this machine: {reason} (its logs: {folder}/session_latest/logs)")

    return _Connection(init, refused, STARTS_S)


def temporary() -> str:
    """Ray's folder for temporary files: its default, or one of raychain's where that cannot be used.

    Raises InputError where there is none.
    """
    name, asked = next(((v, os.environ[v]) for v in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(v)), ("TMPDIR", "/tmp"))  # noqa: S108
    own = f"raychain-{os.getuid()}"
    others = (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")  # noqa: S108
    for folder, private in ((f"{asked}/ray", False), *((f"{other}/{own}", True) for other in others)):
        if len(os.fsencode(folder)) <= LONGEST and folder.startswith("/") and _holds_files(Path(folder), private):
            return folder
    allowed = f"a path of at most {LONGEST - 4} characters that can be written, with {FREE >> 20} MiB free"
    raise InputError(name, asked, allowed, f"set {name} to such a folder: Ray needs it for logs and sockets")


def _holds_files(folder: Path, private: bool) -> bool:
    try:
        folder.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
        found = folder.lstat()
        if private and (not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid()):
            return False
        with tempfile.TemporaryFile(dir=folder):
            return shutil.disk_usage(folder).free >= FREE
    except OSError:
        return False


def check_open_files() -> None:
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most != resource.RLIM_INFINITY and most < FILES:
        raise InputError(
            "ulimit -n", most, f"{FILES} or more open files, which Ray needs", f"raise it: ulimit -n {FILES}"
        )


def _token() -> dict[str, str]:
    """A token for a local instance, as an environment variable, where Ray could not keep one in the home folder."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return {}
    try:
        folder = Path.home() / ".ray"
        if (folder / "auth_token").is_file():
            if (folder / "auth_token").read_bytes().strip():
                return {}
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return {}
    except (OSError, RuntimeError):  # RuntimeError: no home folder at all
        pass
    return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}


def reason_of(error: BaseException) -> str:
    """An error of Ray in one line."""
    said = str(error).strip().splitlines()
    words = next((line for line in said if "AuthToken" in line), " ".join(" ".join(said).split()))
    return plain_text(words)[:300] or type(error).__name__
