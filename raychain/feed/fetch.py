"""Reading from addresses: object storage that fails for a moment is asked again."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar, cast

from raychain import storage
from raychain.storage import is_local, resolve

TRIES = 5
PAUSE_S = 0.5
"""Before the second try; doubles with every further one."""
READ_AHEAD = 2**21
"""Bytes asked of object storage at once: one request for many members, not one for each."""
T = TypeVar("T")


def patiently(address: str, action: Callable[[], T]) -> T:
    """`action()`, tried TRIES times if `address` is object storage and it raises OSError.

    Raises what it raised for local paths and for files that are not there, else OSError that names the address.
    """
    if is_local(address):
        return action()
    return storage.patiently(action, address, [PAUSE_S * 2**tried for tried in range(TRIES - 1)])


def open_input(address: str, read_ahead: int = READ_AHEAD) -> BinaryIO:
    """A readable, seekable file; on object storage `read_ahead` bytes are read at once, and failed reads repeated.

    Raises OSError where the file is missing or cannot be read, at once or while it is read.
    """
    if is_local(address):
        filesystem, path = resolve(address)
        return cast(BinaryIO, filesystem.open_input_file(path))
    return io.BufferedReader(_Patient(address), read_ahead)


class _Patient(io.RawIOBase):
    """A file of object storage, opened anew at the same place when a read fails."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._file: Any = None
        self._place = 0
        patiently(address, self._open)

    def _open(self) -> Any:
        if self._file is None:
            filesystem, path = resolve(self.address)
            self._file = filesystem.open_input_file(path)
            self._size = self._file.size()
        return self._file

    def _read(self, size: int) -> bytes:
        try:
            file = self._open()
            file.seek(self._place)
            return file.read(size)
        except OSError:
            self._file = None
            raise

    def readinto(self, target: Any) -> int:
        content = patiently(self.address, lambda: self._read(len(target)))
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
