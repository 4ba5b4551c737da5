"""The files in a tar, however damaged it is."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO, NamedTuple

from raychain.feed.health import HEADER, LINK, TRUNCATED, UNSAFE

SEARCHED = 2**20
"""Bytes read at once while the next intact header is looked for; a multiple of the block size."""
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
Report = Callable[[str, str, str], None]
"""Hears of what cannot be used: kind, sample or place, detail."""


class Member(NamedTuple):
    """A file in a tar. `content` reads it, and is None for the member inside which a truncated tar ends."""

    key: str
    extension: str
    """Without its dot, in lower case."""
    size: int
    content: Callable[[], bytes] | None


def split_name(name: str) -> tuple[str | None, str | None]:
    """Base and extensions of a member's name, parted at the file name's first dot as webdataset does; else None."""
    match = _NAME.fullmatch(name)
    return match.groups() if match else (None, None)  # type: ignore[return-value]


def walk(file: BinaryIO, report: Report) -> Iterator[Member]:
    """The files of a tar that have an extension, in order. `report` hears of links, devices, unsafe names and damage.

    Reading goes on at the next intact header after a damaged one, and ends where a truncated file does.
    Raises OSError where the file cannot be read.
    """
    size, position = file.seek(0, io.SEEK_END), 0
    while True:
        file.seek(position)
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - whoever opened the file closes it
            for info in tar:
                position = tar.offset
                name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                key, extension = split_name(name)
                cut = info.offset_data + info.size > size
                if cut:
                    report(TRUNCATED, name, f"the file ends after {size:,} bytes inside this member")
                if _acceptable(info, name, report) and key is not None and extension is not None:
                    yield Member(key, extension.lower(), info.size, None if cut else partial(_read, tar, info))
                if cut:
                    return
        except (tarfile.TarError, ValueError):  # found again, and named, below
            pass
        damage = _damage(file, position, size)
        if damage is None:
            return
        report(damage[0], f"byte {position}", damage[1])
        following = _next_header(file, position + tarfile.BLOCKSIZE, size)
        if following is None:
            return
        position = following


def _acceptable(info: tarfile.TarInfo, name: str, report: Report) -> bool:
    """Whether a member is a file with a name inside the archive's folder."""
    if info.isdir():
        return False
    if not info.isfile():
        report(LINK, name, f"→ {info.linkname}" if info.linkname else "")
    elif name.startswith("/") or ".." in name.split("/"):
        report(UNSAFE, split_name(name)[0] or name, "absolute" if name.startswith("/") else "outside its folder")
    else:
        return True
    return False


def _read(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    try:
        handle = tar.extractfile(info)
        return handle.read() if handle else b""
    except tarfile.TarError as error:  # the file has become shorter since it was opened
        raise OSError(f"{info.name}: {error}") from error


def _damage(file: BinaryIO, position: int, size: int) -> tuple[str, str] | None:
    """Why no member starts at `position`: (kind, detail), or None at the archive's proper end."""
    file.seek(min(position, size))
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        return TRUNCATED, "the file ends without the two empty blocks of a complete archive"
    if not block.strip(b"\0"):
        while rest := file.read(SEARCHED):
            if rest.strip(b"\0"):
                return HEADER, "an empty block, and data after it"
        return None
    if len(block) < tarfile.BLOCKSIZE:
        return TRUNCATED, "the file ends inside a member's header"
    return HEADER, "not a member's header"


def _next_header(file: BinaryIO, start: int, size: int) -> int | None:
    """Where the first header with a valid checksum stands from `start` on, which is a whole number of blocks in."""
    for offset in range(start, size, SEARCHED):
        file.seek(offset)
        piece = file.read(SEARCHED)
        for mark in re.finditer(b"ustar", piece):
            place = mark.start() - 257
            if place >= 0 and place % tarfile.BLOCKSIZE == 0 and _is_header(piece[place : place + tarfile.BLOCKSIZE]):
                return offset + place
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True
