"""Reading from addresses: object storage that fails for a moment is asked again."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar, cast

from raychain.core import storage
from raychain.core.storage import ANSWER_S, TRANSFER_S, is_command, is_local, regular_file, resolve
from raychain.data.commands import output

TRIES = 5
PAUSE_S = 0.5
"""Before the second try; doubles with every further one."""
READ_AHEAD = 2**21
"""Bytes asked of object storage at once: one request for many members, not one for each."""
T = TypeVar("T")


def patiently(address: str, action: Callable[[], T], limit_s: float = ANSWER_S) -> T:
    """`action()`, tried TRIES times if `address` is object storage and it raises OSError, or takes `limit_s`.

    Raises what it raised for local paths and for files that are not there, else OSError that names the address.
    """
    if is_local(address):
        return action()
    return storage.patiently(action, address, [PAUSE_S * 2**tried for tried in range(TRIES - 1)], limit_s)


def open_input(address: str, read_ahead: int = READ_AHEAD) -> BinaryIO:
    """A readable, seekable file; on object storage `read_ahead` bytes are read at once, and failed reads repeated.

    A command runs, and has printed all of it. Raises OSError where the file is missing or cannot be read, at once or
    while it is read.
    """
    if is_command(address):
        return output(address)
    if is_local(address):
        filesystem, path = resolve(address)
        regular_file(path)
        return cast(BinaryIO, filesystem.open_input_file(path))
    return io.BufferedReader(_Patient(address), read_ahead)


class _Patient(io.RawIOBase):
    """A file of object storage, opened anew at the same place when a read fails."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._file: Any = None
        self._place = 0
        patiently(address, self._open)

    def _open(self) -> None:
        filesystem, path = resolve(self.address)
        file = filesystem.open_input_file(path)
        self._size, self._file = file.size(), file

    def _read(self, size: int, place: int) -> bytes:
        # put back only once it has answered: a try that was given up still uses it
        file, self._file = self._file, None
        if file is None:
            filesystem, path = resolve(self.address)
            file = filesystem.open_input_file(path)
        content: bytes = file.read_at(size, place)
        self._file = file
        return content

    def readinto(self, target: Any) -> int:
        size, place = len(target), self._place
        content = patiently(self.address, lambda: self._read(size, place), TRANSFER_S)
        target[: len(content)] = content
        self._place += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if self._file is not None and not self.closed:
            self._file.close()
        super().close()
