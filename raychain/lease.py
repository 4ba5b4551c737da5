"""One driver at a time: mutual exclusion over a name in a folder, on local disks and on object storage.

Who wants the lease writes a claim of its own, `<name>/<id>.json`, and only then looks for the claims of others. It
holds the lease if nobody else has a live claim. Of two that claim at once, at least the later one to write sees the
other (storage must show a finished write to every later read, as local disks, S3 and GCS do), so never both hold it,
however long any step takes. Where both see each other the smaller id stays, and the larger withdraws unless it holds.

A claim is alive while its counter changes. Who watches measures that on a clock of its own; the holder takes the lease
for lost after two thirds of that time without a renewal, counted from the start of the last one. A claim of a process
of this machine is dead at once when the process is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

from raychain import records
from raychain.core.storage import Folder

log = logging.getLogger("raychain.runs")

STALE_S = 60.0
"""A claim that has not changed for so long is dead."""
LOST_SHARE = 2 / 3
"""Share of the stale time for which a holder that cannot renew its claim may rely on it."""
BEAT_SHARE = 1 / 12
"""Share of the stale time that lies between two renewals."""
SETTLE_S = (0.05, 2.0)
"""Between writing a claim and looking for others, on a local disk and elsewhere: rivals of the same moment meet then
rather than after one of them holds the lease, and storage that shows writes a little late has shown them."""
POLL_S = (0.1, 2.0)
"""Between two looks while somebody else has a claim, on a local disk and elsewhere."""
SUFFIX = ".json"
LEASE = ".driver"
"""The lease of a run's folder, or a search's."""


@dataclass(frozen=True)
class Holder:
    """The process that a claim belongs to."""

    id: str
    host: str
    pid: int
    held: bool
    """It holds the lease; else it is about to."""
    process: str
    """Machine and start time of the process; empty where the system does not tell them."""

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"

    @property
    def dead(self) -> bool:
        """It is a process of this machine that has ended."""
        machine, _, started = self.process.rpartition("/")
        return machine != "" and machine == _machine() and _ended(self.pid, started)


class Lease:
    """Mutual exclusion of processes over `name` in `folder`. As a context manager it releases at the end.

    The times are seconds and have to be the same for all that use the name: `settle_s` and `poll_s` depend on the
    folder unless given.
    """

    def __init__(
        self,
        folder: Folder,
        name: str,
        *,
        stale_s: float = STALE_S,
        settle_s: float | None = None,
        poll_s: float | None = None,
    ) -> None:
        self.folder, self.name, self.stale_s = folder, name, stale_s
        self.settle_s = SETTLE_S[not folder.local] if settle_s is None else settle_s
        self.poll_s = POLL_S[not folder.local] if poll_s is None else poll_s
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._dead: set[str] = set()
        self._id: str | None = None
        self._counter = 0
        self._renewed = 0.0
        self._lost = False
        self._beating: threading.Thread | None = None
        self._stop = threading.Event()

    def acquire(self, wait: Callable[[Holder], bool] = lambda _: True) -> bool:
        """Blocks until this process holds the lease, then True.

        While somebody else has a live claim, `wait` is called with it at every look; False if `wait` returns False.
        Raises OSError where the folder cannot be read or written; object storage may fail for the stale time.
        """
        assert self._id is None, "acquire once, then release"
        failing: float | None = None
        while True:
            try:
                rivals = self._rivals()
                if not rivals and self._claim():
                    return True
                failing = None
            except OSError as error:
                failing = _now() if failing is None else failing
                if self.folder.local or isinstance(error, PermissionError) or _now() - failing > self.stale_s:
                    raise
                log.warning("%s in %s: tried again: %s", self.name, self.folder.address, error)
                rivals = []
            if rivals and not wait(max(rivals, key=lambda rival: rival.held)):
                return False
            self._pause()

    @property
    def lost(self) -> bool:
        """Somebody else may hold the lease from now on, or soon: stop. It never comes back."""
        if self._id is not None and not self._lost and _now() - self._renewed > LOST_SHARE * self.stale_s:
            self._lose("it could not be renewed in time")
        return self._lost

    def release(self) -> None:
        """Gives the lease back, if it is held; the next process can have it at once."""
        self._stop.set()
        if self._beating is not None:
            self._beating.join(LOST_SHARE * self.stale_s)  # a renewal under way would bring the claim back
            self._beating = None
        self._withdraw()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _claim(self) -> bool:
        """Holds the lease, or has withdrawn its claim."""
        own, held = uuid.uuid4().hex, False
        self._id, self._counter, self._lost, self._renewed = own, 0, False, _now()
        try:
            self._write(own, held=False)
            time.sleep(self.settle_s)
            while rivals := self._rivals():
                if any(rival.held or rival.id < own for rival in rivals):
                    return False
                self._pause()  # the rest withdraw, or are dead and soon known to be
                if _now() - self._renewed > BEAT_SHARE * self.stale_s:
                    self._write(own, held=False)
            self._write(own, held=True)
            if self.lost:
                return False
            for name in self._dead:
                self._remove(name)
            held = True
        finally:
            if not held:
                self._withdraw()
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, args=(own, self._stop), name="lease", daemon=True)
        self._beating.start()
        return True

    def _rivals(self) -> list[Holder]:
        """The live claims of others; a claim written before the call is among them.

        A disk's listing may miss a file that is replaced meanwhile. So there are two, and claims known before are read
        in any case.
        """
        names = {*self.folder.list(self.name), *self._seen}
        if self.folder.local:
            names.update(self.folder.list(self.name))
        rivals, self._dead = [], set()
        for name in sorted(names):
            if not name.endswith(SUFFIX) or name == f"{self._id}{SUFFIX}":
                continue
            looked = _now()
            content = records.content(self.folder, f"{self.name}/{name}")
            if content is None:
                self._seen.pop(name, None)
                continue
            before, since = self._seen.get(name, (None, 0.0))
            if content != before:
                since = _now()
                self._seen[name] = content, since
            holder = _parse(name, content)
            if holder.dead or looked - since > self.stale_s:
                self._dead.add(name)
            else:
                rivals.append(holder)
        return rivals

    def _write(self, own: str, *, held: bool) -> None:
        """Renews the claim. One that took effect too late, after others may have taken it for dead, loses the lease."""
        begun = _now()
        self._counter += 1
        claim = records.ClaimRecord(
            host=socket.gethostname(),
            pid=os.getpid(),
            process=f"{_machine()}/{_stat(os.getpid())[1]}" if _machine() else "",
            counter=self._counter,
            held=held,
        )
        records.write(self.folder, f"{self.name}/{own}{SUFFIX}", claim)
        if not self.lost:
            self._renewed = begun

    def _beat(self, own: str, stop: threading.Event) -> None:
        """Renews the claim until it is released or lost."""
        pause = BEAT_SHARE * self.stale_s
        while not stop.wait(pause) and not self.lost:
            pause = BEAT_SHARE * self.stale_s
            try:
                if not self.folder.exists(f"{self.name}/{own}{SUFFIX}"):
                    self._lose("its claim was removed")
                else:
                    self._write(own, held=True)
            except Exception as error:  # whatever the storage's driver raises: it may work again in time
                log.warning("%s in %s: not renewed, tried again: %s", self.name, self.folder.address, error)
                pause /= 4

    def _lose(self, why: str) -> None:
        self._lost = True
        log.error("%s in %s: others may have taken it: %s", self.name, self.folder.address, why)

    def _withdraw(self) -> None:
        own, self._id = self._id, None
        if own is not None:
            self._remove(f"{own}{SUFFIX}")

    def _remove(self, name: str) -> None:
        try:
            self.folder.remove(f"{self.name}/{name}")
        except OSError as error:  # it is renewed no more, so others take it for dead in time
            log.warning("%s/%s in %s: not removed: %s", self.name, name, self.folder.address, error)

    def _pause(self) -> None:
        time.sleep(self.poll_s * random.uniform(0.5, 1))


def is_abandoned(folder: Folder, name: str) -> bool:
    """Whether those that claim the lease are processes of this machine that have ended. Raises OSError."""
    claims = [claim for claim in folder.list(name) if claim.endswith(SUFFIX)]
    contents = [(claim, records.content(folder, f"{name}/{claim}")) for claim in claims]
    dead = [_parse(claim, content).dead for claim, content in contents if content is not None]
    return bool(dead) and all(dead)


def patience(what: str, say: Callable[[str], None]) -> Callable[[Holder], bool]:
    """For `acquire`: waits without end, and says once of each holder that it is waited for."""
    told: set[str] = set()

    def wait(holder: Holder) -> bool:
        if str(holder) not in told:
            told.add(str(holder))
            say(f"{what} by another driver ({holder}): waiting for it")
        return True

    return wait


def _parse(name: str, content: bytes) -> Holder:
    """The claim in a file. One that does not say whose it is counts as held until it is stale."""
    claim = records.parse(content, records.ClaimRecord) or records.ClaimRecord()
    return Holder(name.removesuffix(SUFFIX), claim.host, claim.pid, claim.held, claim.process)


def _now() -> float:
    """Seconds of a clock that no one sets; on Linux it goes on while the machine is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@cache
def _machine() -> str:
    """This boot of this machine and, in a container, the container; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, str]:
    """State and start time of a process. Raises OSError if there is none that this user may look at."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold anything
    return fields[0], fields[19]


def _ended(pid: int, started: str) -> bool:
    """Whether the process that had this pid and start time is no more; another may have its pid."""
    try:
        state, since = _stat(pid)
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False  # another user's, and hidden
        return False
    return since != started or (state in "ZX" and not _threads_run(pid))


def _threads_run(pid: int) -> bool:
    """Whether a thread of a process goes on; its first one may have ended before, and is a zombie then."""
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if thread.read_text().rpartition(")")[2].split()[0] not in "ZX":
                return True
    return False
