"""The files in a tar, however damaged or hostile it is: every step goes forward, and what is read for it is bounded.

It reads sound shards too, in which it finds the samples that webdataset's iterators find (a property test compares
them): whether a shard is sound is known once it has been read, and counting skips the contents, which they read.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO, NamedTuple

from raychain.data.health import HEADER, LINK, SPARSE, TRUNCATED, UNSAFE
from raychain.schema.captions import KeySplit

BLOCK = tarfile.BLOCKSIZE
SEARCHED = 2**20
"""Bytes read at once at most while the next intact header is looked for; a multiple of the block size."""
SEARCHED_FIRST = 2**13
"""Bytes read first, since hostile files are damaged at every block."""
LONGEST = 2**20
"""Bytes that a long name or a member's pax records may have."""
CHAINED = 16
"""Headers with names and records that a member may have."""
_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_SPARSE_EXTENDED = (482, 504)
"""Bytes that say whether a block of a sparse file's map follows: in its header, and in each such block."""
_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
_FIRST_DOT = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_LAST_DOT = re.compile(r"((?:.*/)?[^/]+)[.]([^./]*)", re.DOTALL)
Report = Callable[[str, str, str], None]
"""Hears of what cannot be used: kind, sample or place, detail."""


class Member(NamedTuple):
    """A file in a tar. `content` reads it, and is None for the member inside which a truncated tar ends."""

    name: str
    size: int
    content: Callable[[], bytes] | None


class _Entry(NamedTuple):
    """A member's header with what longer names and pax records before it say."""

    info: tarfile.TarInfo
    data: int
    """Where its content begins."""
    following: int
    """Where the next header is."""
    sparse: bool


class _DamagedError(Exception):
    """No member can be read here: kind, detail, and from which byte on the next one is looked for."""

    def __init__(self, kind: str, detail: str, resume: int) -> None:
        super().__init__(kind, detail, resume)
        self.kind, self.detail, self.resume = kind, detail, resume


def split_name(name: str, at: KeySplit = "first") -> tuple[str | None, str | None]:
    """Key and extension of a member's name, parted at the file name's first dot as webdataset does, or at its last.

    Returns (None, None) for a name that has no such dot.
    """
    match = (_FIRST_DOT if at == "first" else _LAST_DOT).fullmatch(name)
    return match.groups() if match else (None, None)  # type: ignore[return-value]


def walk(file: BinaryIO, report: Report, at: KeySplit = "first") -> Iterator[Member]:
    """The files of a tar in order, without what macOS puts beside them. `report` hears of links, devices, sparse files,
    unsafe names and damage; `at` tells under which key.

    Reading goes on at the next intact header after a damaged one, and ends where a truncated file does.
    Raises OSError where the file cannot be read.
    """
    size, position = file.seek(0, io.SEEK_END), 0
    common: dict[str, str] = {}
    while True:
        try:
            entry = _entry(file, position, size, common)
        except _DamagedError as damage:
            report(damage.kind, f"byte {position}", damage.detail)
            following = _next_header(file, damage.resume, size)
            if following is None:
                return
            position = following
            continue
        if entry is None:
            return
        position, info = entry.following, entry.info
        name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        cut = entry.data + info.size > size
        if cut:
            report(TRUNCATED, name, f"the file ends after {size:,} bytes inside this member")
        if _acceptable(entry, name, report, at):
            yield Member(name, info.size, None if cut else partial(_read, file, name, entry.data, info.size))
        if cut:
            return


def _acceptable(entry: _Entry, name: str, report: Report, at: KeySplit) -> bool:
    """Whether a member is a file with a name inside the archive's folder, and not one of macOS's own."""
    info, parts = entry.info, name.split("/")
    if info.isdir() or parts[-1].startswith("._") or "__MACOSX" in parts[:-1]:
        return False
    if entry.sparse:
        report(SPARSE, name, "")
    elif not info.isfile():
        report(LINK, name, f"→ {info.linkname}" if info.linkname else "")
    elif name.startswith("/") or ".." in parts:
        report(UNSAFE, split_name(name, at)[0] or name, "absolute" if name.startswith("/") else "outside its folder")
    else:
        return True
    return False


def _read(file: BinaryIO, name: str, start: int, size: int) -> bytes:
    file.seek(start)
    content = file.read(size)
    if len(content) < size:
        raise OSError(f"{name}: the file has become shorter since it was opened")
    return content


def _entry(file: BinaryIO, position: int, size: int, common: dict[str, str]) -> _Entry | None:
    """The member whose headers begin at `position`; None at the archive's proper end. Raises _DamagedError.

    `common` holds the pax records for all members, and takes those that stand here. Of several records for this member
    the first counts, as in tarfile.
    """
    own: dict[str, str] = {}
    place = position
    for _ in range(CHAINED):
        file.seek(min(place, size))
        block = file.read(BLOCK)
        data = place + BLOCK
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError):
            if place > position:
                raise _DamagedError(HEADER, "a long name or pax records without a member", data) from None
            _check_end(file, block, position, size)
            return None
        if info.size < 0:
            raise _DamagedError(HEADER, f"a member of {info.size:,} bytes", data)
        if info.type not in _NAMES + _PAX:
            return _completed(file, info, data, size, common | own)
        if info.size > LONGEST:
            raise _DamagedError(HEADER, f"a name or pax records of {info.size:,} bytes", data)
        content = file.read(info.size)
        place = data + _blocks(info.size)
        if len(content) < info.size:
            raise _DamagedError(TRUNCATED, "the file ends inside a member's header", place)
        if info.type in _PAX:
            records = _pax_records(content, place)
            if info.type == tarfile.XGLTYPE:
                common |= records
            else:
                own = records | own
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            own.setdefault("path", content.partition(b"\0")[0].decode("utf-8", "surrogateescape"))
    raise _DamagedError(HEADER, f"more than {CHAINED} long names or pax records of one member", place)


def _completed(file: BinaryIO, info: tarfile.TarInfo, data: int, size: int, records: dict[str, str]) -> _Entry:
    """The member with what the records say of it. Raises _DamagedError."""
    info.name = records.get("path", info.name)
    if "size" in records:
        given = records["size"]
        if not (given.isascii() and given.isdigit() and len(given) <= 20):
            raise _DamagedError(HEADER, f"a member of {given[:20]!r} bytes", data)
        info.size = int(given)
    sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in records)
    if info.type == tarfile.GNUTYPE_SPARSE:
        data = _after_map(file, data - BLOCK, size)
    holds = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES  # a link's size says nothing of this file
    if not holds:
        info.size = 0
    return _Entry(info, data, data + _blocks(info.size), sparse)


def _after_map(file: BinaryIO, header: int, size: int) -> int:
    """Where the content of an old GNU sparse file begins, whose header stands at `header`."""
    place, flag = header, _SPARSE_EXTENDED[0]
    while place < size:
        file.seek(place + flag)
        extended = file.read(1)
        place, flag = place + BLOCK, _SPARSE_EXTENDED[1]
        if extended in (b"", b"\0"):
            break
    return place


def _pax_records(content: bytes, following: int) -> dict[str, str]:
    """Keys and values of a pax header, up to what is none. Raises _DamagedError for a record that ends elsewhere.

    `following` is where the next header stands.
    """
    found: dict[str, str] = {}
    place = 0
    while match := _RECORD.match(content, place):
        stop = place + int(match[1])
        if not match.end() < stop <= len(content):
            raise _DamagedError(HEADER, "a pax record of another length than it has", following)
        key, value = match[2], content[match.end() : stop - 1]
        text = value.decode("utf-8", "surrogateescape")
        found[key.decode("utf-8", "surrogateescape")] = text.rstrip("/") if key == b"path" else text
        place = stop
    return found


def _check_end(file: BinaryIO, block: bytes, place: int, size: int) -> None:
    """Returns where the archive ends properly with the `block` at `place`, which is no header.

    Raises _DamagedError elsewhere.
    """
    following = place + BLOCK
    if not block:
        detail = "the file ends without the two empty blocks of a complete archive"
        raise _DamagedError(TRUNCATED, detail, following)
    if not block.strip(b"\0"):
        if any(piece.strip(b"\0") for _, piece in _pieces(file, following, size)):
            raise _DamagedError(HEADER, "an empty block, and data after it", following)
        return
    if len(block) < BLOCK:
        raise _DamagedError(TRUNCATED, "the file ends inside a member's header", following)
    raise _DamagedError(HEADER, "not a member's header", following)


def _next_header(file: BinaryIO, start: int, size: int) -> int | None:
    """Where the first header with a valid checksum stands from `start` on, which is a whole number of blocks in."""
    for offset, piece in _pieces(file, start, size):
        for mark in re.finditer(b"ustar", piece):
            place = mark.start() - 257
            if place >= 0 and place % BLOCK == 0 and _is_header(piece[place : place + BLOCK]):
                return offset + place
    return None


def _pieces(file: BinaryIO, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The rest of the file from `start` on, in growing pieces of whole blocks, each with its place."""
    length = SEARCHED_FIRST
    while start < size:
        file.seek(start)
        yield start, file.read(length)
        start, length = start + length, min(2 * length, SEARCHED)


def _is_header(block: bytes) -> bool:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size >= 0
    except (tarfile.TarError, ValueError):
        return False


def _blocks(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK
