"""The cache's budget: who may write how much, and which files go. Exact over all processes of a node.

Every byte under the root counts by its file's size. A file that is being written is made as long as it is going to be
before anything is written (a hole costs no disk), so room that is promised is room that is counted. Whoever uses a file
holds a lock on it (flock): readers a shared one as long as the file is mapped, the writer an exclusive one. Only files
that nobody holds are removed, so no removed file takes up disk, and what a killed process left is recognised.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PAUSE_S = 0.02
"""Between two looks whether another process has finished a file."""


class NoRoomError(Exception):
    """Files that others hold leave no room."""


class Room:
    """The bytes under `root`, `budget` at most."""

    def __init__(self, root: Path, budget: int) -> None:
        self.root, self.budget = root, budget

    def settle(self, scratch: Path, path: Path) -> None:
        """Renames a finished file while nobody counts, who could miss it under both names."""
        with exclusive(self.root / "room.lock"):
            scratch.replace(path)

    def remove(self, path: Path, file: BinaryIO) -> None:
        """Takes an open file out of its place and closes it; while others hold it, it lies beside and counts."""
        aside = path.with_name(f"{path.stem}-{os.fstat(file.fileno()).st_ino}.arrow")
        with exclusive(self.root / "room.lock"):
            if _stands(file, path):
                path.replace(aside)
        file.close()
        if (held := claim(aside)) is not None:
            with held:
                aside.unlink(missing_ok=True)

    def reserve(self, file: BinaryIO, size: int, spare: float | None = None) -> None:
        """Makes `file`, which the caller holds, `size` bytes long if it is shorter; the least recently used files go.

        Files used since `spare` (seconds of the epoch) stay. Raises NoRoomError if too much is held or to be spared,
        and OSError where `size` is beyond the budget.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(exclusive(self.root / "room.lock"))
            own = os.fstat(file.fileno()).st_size
            if size <= own:
                return
            removable, fixed = self._files()
            if size + fixed > self.budget:
                raise OSError(f"preload.budget is {self.budget} bytes; one decoded shard needs {size + fixed} or more")
            excess = fixed + sum(length for _, length, _ in removable) - own + size - self.budget
            going = []
            for used, length, path in removable:
                if excess <= 0 or (spare is not None and used >= spare):
                    break
                if (held := claim(path)) is not None:
                    stack.enter_context(held)
                    going.append(path)
                    excess -= length
            if excess > 0:
                raise NoRoomError
            for path in going:
                path.unlink()
            os.ftruncate(file.fileno(), size)

    def _files(self) -> tuple[list[tuple[float, int, Path]], int]:
        """(last use, bytes, path) of shard files in the order they go, and the bytes of all else. Unfinished files come
        first: those that can be claimed were left by a process that was killed."""
        removable, fixed = [], 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    if path.suffix in (".arrow", ".tmp"):
                        removable.append((stat.st_atime if path.suffix == ".arrow" else 0.0, stat.st_size, path))
                    else:
                        fixed += stat.st_size
        return sorted(removable), fixed


def claim(path: Path) -> BinaryIO | None:
    """The file, exclusively held until it is closed; None if somebody holds it or it is gone."""
    return _held(path, "r+b", fcntl.LOCK_EX | fcntl.LOCK_NB)


def create(path: Path) -> BinaryIO:
    """A file to write, exclusively held until it is closed; waits for who holds it. What was in it is gone.

    Looks again and again instead of waiting for the lock: once the other's file is finished and renamed, its readers
    hold it.
    """
    while True:
        path.touch()
        if (file := claim(path)) is not None:
            file.truncate(0)
            return file
        time.sleep(PAUSE_S)


def share(path: Path) -> BinaryIO | None:
    """The file, held together with other readers until it and all its mappings are closed; None if there is none."""
    return _held(path, "rb", fcntl.LOCK_SH)


def _held(path: Path, mode: str, operation: int) -> BinaryIO | None:
    with contextlib.ExitStack() as stack:
        try:
            file: BinaryIO = stack.enter_context(path.open(mode))  # type: ignore[assignment]
            fcntl.flock(file, operation)
        except (FileNotFoundError, BlockingIOError):
            return None
        if not _stands(file, path):  # removed or renamed before it was held
            return None
        stack.pop_all()
        return file


def _stands(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds a lock that lives in an empty file."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
