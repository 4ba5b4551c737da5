"""What a shard is: its content, hashed in full; on object storage the ETag that is changed with it stands in.

A hash is taken once and remembered by what tells that a file was touched: path, device, inode, size, and the times of
the last change to content and inode. None of these is part of an identity, so copies and moves stay the same shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, BinaryIO, NamedTuple, Protocol

import xxhash
from pyarrow import fs

from raychain.core.storage import CHUNK, Folder, is_command, is_local, resolve
from raychain.data.fetch import READ_AHEAD, open_input, patiently

log = logging.getLogger("raychain.data")

FRESH_NS = 2 * 10**9
"""A file changed so shortly before it is hashed may be changed again without another time stamp: those of some file
systems tick every two seconds."""
TRIES = 3
"""How often a file that changes while it is hashed is hashed again."""
TAGS = ("md5hash", "etag", "blob_id", "last-modified")
"""What object storage tells of a content, the best first: a hash of it on GCS and Hugging Face, elsewhere the ETag; of
web servers that have none the date."""
PROBE = 65_536


class Content(NamedTuple):
    """What identifies a file, and what tells that it was touched."""

    identity: str
    """32 hexadecimal digits."""
    size: int
    version: str
    """Changes whenever a local file is touched; empty where that cannot be relied on. On object storage what stands for
    the content there, where `identity` is a hash that was not taken now; else empty."""
    changed: float
    """When it was last touched, seconds since 1970; infinite where nothing tells."""


class Identified(Protocol):
    """A file as it was when it was identified."""

    @property
    def address(self) -> str:
        """Where it lies."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def identity(self) -> str:
        """The identity, as in `Content.identity`."""

    @property
    def version(self) -> str:
        """The version, as in `Content.version`."""


class ChangedError(OSError):
    """A file is no longer the one that was identified: trying again does not mend it."""


def identify(address: str, notes: Folder | None = None, known: Callable[[Content], str] = lambda _: "") -> Content:
    """The identity of a file as it is now. Hashes of local files are kept in `notes`, and taken from there.

    `known` gives the hash of a file that is not read, as it looks without reading it; empty where nothing tells. On
    object storage the ETag is `version` then. Raises OSError for a file that cannot be read or is being written.
    """
    return _local(resolve(address)[1], notes, known) if is_local(address) else _remote(address, known)


@contextlib.contextmanager
def unchanged(file: Identified) -> Iterator[None]:
    """Whatever is read inside is what was identified. Raises ChangedError where it is not, at the latest at the end.

    A local file whose time stamps are others (a copy on another node, a file touched) is hashed once more.
    """
    before = look(file.address)
    expected = file.identity if is_local(file.address) else file.version or file.identity
    if before.size != file.size or (before.identity and before.identity != expected):
        raise _changed(file)
    yield
    after = look(file.address)
    if before.version != after.version or (after.identity and after.identity != expected):
        raise _changed(file)
    trusted = after.identity or (after.version and after.version == file.version)
    if not trusted and identify(file.address).identity != file.identity:
        raise _changed(file)


@contextlib.contextmanager
def opened(file: Identified, read_ahead: int = READ_AHEAD) -> Iterator[BinaryIO]:
    """The file that was identified, open (`open_input`), or what a command prints, if it is that still.

    Raises ChangedError where it is not, at the latest at the end, and OSError.
    """
    if not is_command(file.address):
        with unchanged(file), open_input(file.address, read_ahead) as found:
            yield found
        return
    with open_input(file.address) as printed:
        if hash_of(printed)[0] != file.identity:
            raise ChangedError(
                f"{file.address} no longer prints what it did when it was counted. Where that is meant, remove the "
                "folders `counts` of storage and preload.cache: the same experiment then takes it as other data"
            )
        yield printed


def hash_of(file: BinaryIO) -> tuple[str, int]:
    """The identity of an open file and its size; it stands at its beginning before and after."""
    identity, size = _hash(file), file.tell()
    file.seek(0)
    return identity, size


def former_identity(file: BinaryIO, size: int) -> str:
    """The identity that schema 2 gave a shard: its size and three probes of its content, which miss most changes."""
    probe = hashlib.blake2b(str(size).encode(), digest_size=16)
    for offset in (0, max(0, size // 2), max(0, size - PROBE)):
        file.seek(offset)
        probe.update(file.read(PROBE))
    return probe.hexdigest()


def _changed(file: Identified) -> ChangedError:
    return ChangedError(
        f"{file.address} has changed since it was counted, and must not while it is in use. The same command again "
        "takes it as it is now, as other data: stages that read it are trained again"
    )


def _local(path: str, notes: Folder | None, known: Callable[[Content], str]) -> Content:
    stat = os.stat(path)  # noqa: PTH116 - a plain string of the filesystem
    noted = notes.read_json(_note(path, stat)) if notes else None
    if isinstance(noted, dict) and isinstance(noted.get("identity"), str):
        return _content(noted["identity"], stat, _stamp(stat))
    if identity := known(_content("", stat, _stamp(stat))):
        return _content(identity, stat, _stamp(stat))
    for _ in range(TRIES):
        began = time.time_ns()
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            before = os.fstat(file.fileno())
            identity = _hash(file)
            stat = os.fstat(file.fileno())
        if _stamp(before) == _stamp(stat):
            break
    else:
        raise ChangedError("it is being written")
    if _fresh(stat, began):
        return _content(identity, stat, "")
    if notes:
        with contextlib.suppress(OSError):  # it is hashed again then
            notes.write_json(_note(path, stat), {"identity": identity})
    return _content(identity, stat, _stamp(stat))


def _content(identity: str, stat: os.stat_result, version: str) -> Content:
    return Content(identity, stat.st_size, version, max(stat.st_mtime, stat.st_ctime))


def _fresh(stat: os.stat_result, now: int) -> bool:
    """Whether a change after `now` might leave the time stamps as they are. Only the inode's cannot be set at will."""
    return stat.st_ctime_ns > now - FRESH_NS or 0 <= now - stat.st_mtime_ns < FRESH_NS


def _note(path: str, stat: os.stat_result) -> str:
    """Name under which the hash of a file is kept until the file is touched."""
    return f"{short_hash(f'{path}|{stat.st_dev}|{_stamp(stat)}')}.hash.json"


def _stamp(stat: os.stat_result) -> str:
    return f"{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"


def _hash(file: Any) -> str:
    """Against accidental changes 128 bits that are no cryptographic hash are enough, and no slower than the disk."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()


class Hashed(io.RawIOBase):
    """A file that is hashed on the way, each byte when it is first passed, in the order that it has there."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._digest, self._seen, self._place = xxhash.xxh3_128(), 0, 0

    def readinto(self, target: Any) -> int:
        self._pass(self._place)
        self._file.seek(self._place)
        content = self._file.read(len(target))
        target[: len(content)] = content
        new = self._place + len(content) - self._seen
        if new > 0:
            self._digest.update(content[len(content) - new :])
            self._seen += new
        self._place += len(content)
        return len(content)

    def _pass(self, place: int) -> None:
        """Hashes what lies before a place."""
        self._file.seek(self._seen)
        while self._seen < place and (content := self._file.read(min(CHUNK, place - self._seen))):
            self._digest.update(content)
            self._seen += len(content)

    def hexdigest(self) -> str:
        """The hash of the whole file, of which what was not passed yet is read now."""
        self._pass(self._size)
        return self._digest.hexdigest()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def short_hash(text: str) -> str:
    """32 hexadecimal digits of a text."""
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogateescape"))


def look(address: str) -> Content:
    """What tells that a file was touched, without reading it; the identity only where that does not need reading."""
    if is_local(address):
        stat = os.stat(resolve(address)[1])  # noqa: PTH116
        return _content("", stat, _stamp(stat))
    size, told, changed = patiently(address, lambda: _told(address))
    return Content(short_hash(f"{told}|{size}") if told else "", size, "", changed)


def _remote(address: str, known: Callable[[Content], str]) -> Content:
    size, told, changed = patiently(address, lambda: _told(address))
    if told:
        tag = short_hash(f"{told}|{size}")
        if identity := known(Content(tag, size, "", changed)):
            return Content(identity, size, tag, changed)
        return Content(tag, size, "", changed)
    with open_input(address, CHUNK) as file:
        return Content(_hash(file), size, "", changed)


@cache
def say_tags_stand_in() -> None:
    """Says so, once a process."""
    log.warning(
        "shards on object storage are told apart by their ETags and sizes, not by a hash of their content, so a copy "
        "may count as another shard: raychain data index takes the hashes"
    )


def _told(address: str) -> tuple[int, str, float]:
    """Size of a file, what the storage says instead of its content (empty: nothing), and when it was changed."""
    filesystem, path = resolve(address)
    handler = getattr(filesystem, "handler", None)
    if isinstance(handler, fs.FSSpecHandler):
        handler.fs.invalidate_cache(path)  # fsspec remembers what it has listed
        found: Mapping[str, Any] = handler.fs.info(path)
        size, modified = found.get("size"), None
        with contextlib.suppress(NotImplementedError, KeyError, ValueError, AttributeError):
            modified = handler.fs.modified(path)
    else:
        with filesystem.open_input_file(path) as file:  # asks for what is known of it, and reads nothing
            found, size = file.metadata() or {}, file.size()
        modified = _date(found) or filesystem.get_file_info(path).mtime
    if size is None:
        with open_input(address) as file:
            size = file.seek(0, os.SEEK_END)
    known = {str(name).lower(): value for name, value in found.items()}
    changed = _seconds(modified)
    tag = next((f"{name}|{_text(known[name])}" for name in TAGS if known.get(name)), "")
    return int(size), tag or (f"modified|{changed}" if math.isfinite(changed) else ""), changed


def _date(found: Mapping[Any, Any]) -> datetime | None:
    """The date that came with the rest, which spares asking for it."""
    for name, value in found.items():
        if _text(name).lower() == "last-modified":
            for read in (datetime.fromisoformat, parsedate_to_datetime):  # pyarrow writes it in its own way
                with contextlib.suppress(ValueError):
                    return read(_text(value))
    return None


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _seconds(moment: Any) -> float:
    if isinstance(moment, datetime):
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return float(moment) if isinstance(moment, int | float) else math.inf
