"""Addresses: local paths and object storage behind pyarrow's one filesystem interface."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import queue
import random
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from pyarrow import fs

from raychain.errors import InputError, without_secrets

log = logging.getLogger("raychain.core.storage")
CHUNK = 2**22
"""Bytes read at once where a file is copied or hashed."""
SCRATCH = ".tmp"
"""How the names of files end that are being written."""
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Between attempts to write what must not be lost: a full disk that is cleared, storage that is back in a minute."""
ASKED_S = (0.5, 1.0, 2.0, 4.0)
"""Between attempts that somebody waits for."""
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors that trying again does not mend."""
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

WORD_S, ANSWER_S, TRANSFER_S = 4.0, 6.0, 120.0
"""How long object storage is waited for: without a word, for a word about a file, for content and listings."""
RETRIES_S = 0.1
"""How long Arrow tries again on GCS by itself."""
CONNECT_S, SILENCE_S = 2.0, 5.0
"""How long S3 may take to accept a connection, and between two bytes of an answer."""
ARROWS = ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss", "file")
"""Schemes that pyarrow takes."""
PIPE, WEB = "pipe:", ("http://", "https://")
"""How a shell command that prints a file begins, and an address on the web."""

T = TypeVar("T")


def patiently(
    action: Callable[[], T], what: str, pauses_s: Sequence[float] = PAUSES_S, limit_s: float | None = None
) -> T:
    """`action()`, tried again after each of the pauses if it raises OSError (timeouts are among them).

    Each pause is spread by half, so that many do not come together. With `limit_s` each try is `answered` within that
    time. Raises FINAL errors at once, else OSError that begins with `what`.
    """
    tries = len(pauses_s) + 1
    for tried in range(1, tries + 1):
        try:
            if limit_s is None:
                return action()
            return answered(action, f"{what}, try {tried} of {tries}", limit_s)
        except FINAL:
            raise
        except OSError as error:
            if tried == tries:
                raise OSError(f"{what}: gave up after {tries} tries: {error}") from error
            log.warning("%s: try %d of %d failed: %s", what, tried, tries, error)
            time.sleep(pauses_s[tried - 1] * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def answered(action: Callable[[], T], what: str, limit_s: float) -> T:
    """`action()`, in a thread of its own; a warning says that it is waited for when it takes WORD_S.

    Drivers of object storage wait for minutes without a word, and nothing else interrupts them. Raises TimeoutError
    after `limit_s`, when the thread is left behind, and OSError for errors of a driver's own kind.
    """
    outcomes: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcomes.put((action(), None))
        except BaseException as error:
            outcomes.put((None, error))

    threading.Thread(target=work, name="storage", daemon=True).start()
    try:
        try:
            result, error = outcomes.get(timeout=min(WORD_S, limit_s))
        except queue.Empty:
            log.warning("waiting for %s", what)
            result, error = outcomes.get(timeout=max(limit_s - WORD_S, 0.0))
    except queue.Empty:
        raise TimeoutError(f"no answer within {limit_s:g} s") from None
    if isinstance(error, Exception) and type(error).__module__.partition(".")[0] not in ("builtins", "raychain"):
        raise OSError(f"{type(error).__name__}: {error}") from error
    if error is not None:
        raise error
    return cast(T, result)


def regular_file(path: str | Path) -> os.stat_result:
    """The status of a regular file. Raises OSError for everything else: pipes and devices might never end."""
    try:
        found = os.stat(path)  # noqa: PTH116 - paths come as strings
    except (FileNotFoundError, ValueError):  # ValueError: a NUL, or half of a surrogate pair
        raise FileNotFoundError(errno.ENOENT, "no such file") from None
    kind = KINDS.get(stat.S_IFMT(found.st_mode))
    if kind:
        raise (IsADirectoryError if kind == "a folder" else OSError)(errno.EISDIR, f"{kind}, not a file")
    return found


def is_command(address: str) -> bool:
    """Whether `address` is a command that prints a file."""
    return address.startswith(PIPE)


def is_local(address: str) -> bool:
    """Whether `address` is a path of this machine."""
    return ("://" not in address or address.startswith("file://")) and not is_command(address)


def split_options(address: str) -> tuple[str, str]:
    """An address without its options (`s3://…?endpoint_override=…`), and those with their question mark."""
    has_some = "=" in address and not is_local(address) and not is_command(address)
    base, mark, options = address.partition("?") if has_some or address.startswith(WEB) else (address, "", "")
    return base, mark + options


def below(address: str, name: str) -> str:
    """The address of `name` in the folder at `address`."""
    base, options = split_options(address)
    return f"{base.rstrip('/')}/{name}{options}"


def local_path(path: str | Path, where: str) -> Path:
    """The path with `~` expanded.

    Raises InputError, naming `where`, for what no file can be called, and for the home of a user that is not there.
    """
    given = str(path)
    try:
        named = b"\0" not in os.fsencode(given)
    except UnicodeEncodeError:  # half of a surrogate pair
        named = False
    if not named:
        raise InputError(where, given, "a path", "leave out the characters that no path may have")
    found = Path(os.path.expanduser(given))  # noqa: PTH111 - pathlib's takes `./~a` for a home
    if given.startswith("~") and found.parts[0].startswith("~") and not Path(found.parts[0]).exists():
        raise InputError(where, given, "a path; ~ and ~USER stand for homes", f"there is no {found.parts[0]}")
    return found


def resolve(address: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of `address` and the path on it. Paths are made absolute; `~` is expanded.

    s3://, gs://, hdfs:// and file:// go through pyarrow, every other scheme through fsspec.
    Raises InputError for a scheme neither knows, options and forms that it does not know, and storage that cannot be
    reached where an address says nothing of its region, and for the home of a user that is not there.
    """
    if is_command(address):
        raise InputError(
            "address", address, "an address that can be written, or looked at", "name a path or an address"
        )
    if "://" not in address:
        return fs.LocalFileSystem(), str(local_path(address, "address").absolute())
    scheme = address.partition("://")[0].lower()
    try:
        if "::" in address or not scheme:
            raise InputError("address", address, "one address with one scheme", "give the file itself, unpacked")
        filesystem, path = answered(partial(_opened, address, scheme), address, TRANSFER_S)
    except InputError:
        raise
    except Exception as error:  # drivers of fsspec raise nearly all of them for what they miss
        known = f"{scheme}://BUCKET/PATH?OPTIONS" if scheme in ARROWS else "s3://, gs://, a path, or what fsspec knows"
        fix = f"correct the address ({error})"
        if scheme not in ARROWS:
            fix = f"correct {scheme}:// or install its fsspec driver ({error})"
        raise InputError("address", address, known, fix) from None
    if not path.strip("/") and not isinstance(filesystem, fs.LocalFileSystem):
        raise InputError("address", address, f"{scheme}://BUCKET/PATH", "name the bucket")
    return filesystem, path


def _opened(address: str, scheme: str) -> tuple[fs.FileSystem, str]:
    """`resolve` for addresses with a scheme. Raises what pyarrow and fsspec raise."""
    if scheme in ARROWS:
        if scheme in ("gs", "gcs") and "retry_limit_seconds" not in address:  # Arrow's own is a quarter of an hour
            address += ("&" if "?" in address else "?") + f"retry_limit_seconds={RETRIES_S}"
        try:
            filesystem, path = fs.FileSystem.from_uri(address)
            if scheme == "s3":  # it has no limits of its own, and an address cannot give them
                limits = {"connect_timeout": CONNECT_S, "request_timeout": SILENCE_S}
                filesystem = fs.S3FileSystem(**filesystem.__reduce__()[1][0] | limits)
            return filesystem, path
        except NotImplementedError:  # this pyarrow was built without it
            pass
    import fsspec

    options = {"encoded": "%" in address} if address.startswith(WEB) else {}  # escapes stay: they may be signed
    driver, path = fsspec.core.url_to_fs(address, **options)
    if isinstance(driver, fsspec.get_filesystem_class("file")):
        return fs.LocalFileSystem(), path
    return fs.PyFileSystem(fs.FSSpecHandler(driver)), path


class Folder:
    """A folder at an address. Files appear whole or not at all: written beside and renamed, or put in one piece."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.local = is_local(address)
        self.fs, self.path = resolve(address)
        self._reached = False

    def join(self, name: str) -> str:
        """Path of `name` on this folder's filesystem."""
        return f"{self.path}/{name}" if name else self.path

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of that name."""
        return self._told(lambda: self.fs.get_file_info(self.join(name)).type != fs.FileType.NotFound, ANSWER_S)

    def _told(self, action: Callable[[], T], limit_s: float = TRANSFER_S) -> T:
        """`action()`; object storage is asked patiently, and answers within a time each time. Raises OSError."""
        if self.local:
            return action()
        if not self._reached:  # a word about a file takes no time, and nothing interrupts pyarrow's listing of GCS
            patiently(self._reach, self.address, ASKED_S, ANSWER_S)
            self._reached = True
        return patiently(action, self.address, ASKED_S, limit_s)

    def _reach(self) -> None:
        """Returns once the storage has answered, be it with an error."""
        with contextlib.suppress(OSError):
            self.fs.get_file_info(self.path)

    def list(self, name: str = "") -> list[str]:
        """Names in the subfolder `name`, sorted; none if it does not exist."""
        if self.local:  # pyarrow fails at names that are not UTF-8
            try:
                return sorted(path.name for path in Path(self.join(name)).iterdir())
            except FileNotFoundError:
                return []
        handler = getattr(self.fs, "handler", None)
        if isinstance(handler, fs.FSSpecHandler):
            handler.fs.invalidate_cache()  # fsspec remembers listings, and other machines write here
        selector = fs.FileSelector(self.join(name), allow_not_found=True)
        infos = self._told(lambda: self.fs.get_file_info(selector))
        return sorted(info.base_name for info in infos)

    def read(self, name: str) -> bytes | None:
        """Content of a file, or None if it does not exist. Raises OSError; for what is no file, instead of waiting."""
        try:
            if self.local and not stat.S_ISREG(os.stat(self.join(name)).st_mode):  # noqa: PTH116 - asked once, as it may go
                raise OSError(f"{self.join(name)} is no regular file")
            return self._told(lambda: self._content(name))
        except (FileNotFoundError, NotADirectoryError):  # perhaps only just
            return None

    def _content(self, name: str) -> bytes:
        with self.fs.open_input_stream(self.join(name)) as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes) -> None:
        """Writes a file atomically, making folders as needed."""
        self._told(lambda: self._write(name, content))

    def _write(self, name: str, content: bytes) -> None:
        with self._placed(name) as scratch, self.fs.open_output_stream(scratch) as stream:
            stream.write(content)

    @contextlib.contextmanager
    def _placed(self, name: str) -> Iterator[str]:
        """Where to write what becomes the file `name` in one piece; its folders are made."""
        target = self.join(name)
        self.fs.create_dir(target.rpartition("/")[0], recursive=True)
        if not self.local:
            yield target
            return
        scratch = f"{target}.{uuid.uuid4().hex[:8]}{SCRATCH}"
        try:
            yield scratch
            os.replace(scratch, target)  # noqa: PTH105 - both are plain strings of the filesystem
        finally:
            with contextlib.suppress(OSError):  # left by a failure, or by renaming a link to the very file it replaces
                os.unlink(scratch)  # noqa: PTH108

    def sha256(self, name: str, also: Callable[[bytes], None] = lambda _: None) -> str:
        """SHA-256 of a file's content, read as a stream of which `also` gets every piece. Raises FileNotFoundError."""
        digest = hashlib.sha256()
        with self.fs.open_input_stream(self.join(name)) as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                also(chunk)
        return digest.hexdigest()

    def copy_file(
        self, name: str, target: Folder, target_name: str, also: Callable[[bytes], None] = lambda _: None
    ) -> str:
        """Copies a file to `target_name` of another folder, whole or not at all; returns the content's SHA-256.

        `also` gets every piece of the content. On one disk it becomes a hard link: change neither in place. Within one
        object store it is copied there. Everything else, and where that fails, goes through this process. The content
        is read once in any case.
        """
        source = self.join(name)
        with target._placed(target_name) as scratch:
            if self._copied_in_place(source, target, scratch):
                return self.sha256(name, also)
            digest, stream = hashlib.sha256(), self.fs.open_input_stream(source)
            try:
                with stream, target.fs.open_output_stream(scratch) as sink:
                    while chunk := stream.read(CHUNK):
                        digest.update(chunk)
                        also(chunk)
                        sink.write(chunk)
            except BaseException:
                if not target.local:
                    target.remove(target_name)  # closing has put what had been written
                raise
            return digest.hexdigest()

    def _copied_in_place(self, source: str, target: Folder, path: str) -> bool:
        """Whether `source` is at `path` of the other folder now without its content having come through here."""
        try:
            if self.local and target.local:
                os.link(os.path.realpath(source), path)
            elif self.fs.equals(target.fs):
                self.fs.copy_file(source, path)
            else:
                return False
        except (OSError, NotImplementedError):  # another disk, or one without links; S3 refuses more than 5 GB
            return False
        return True

    def read_json(self, name: str) -> Any:
        """A JSON file's content; None if it does not exist or is not JSON (half-written by something else)."""
        content = self.read(name)
        try:
            return None if content is None else json.loads(content)
        except (ValueError, RecursionError):
            return None

    def write_json(self, name: str, value: Any) -> None:
        """Writes `value` as JSON, atomically, without the secrets of addresses in it."""
        self.write(name, (without_secrets(json.dumps(value, indent=2, allow_nan=False)) + "\n").encode())

    def publish(self, source: Path, name: str, marker: str) -> None:
        """Copies a local folder to `name`; the file `marker` goes last and says that the folder is complete."""
        self.fs.create_dir(self.join(name), recursive=True)
        for path in sorted(source.rglob("*"), key=lambda p: p.name == marker):
            if path.is_file():
                relative = f"{name}/{path.relative_to(source).as_posix()}"
                if path.name == marker:
                    self.write(relative, path.read_bytes())
                else:
                    with self._placed(relative) as scratch:  # what is there may be a link to another folder's file
                        fs.copy_files(str(path), scratch, fs.LocalFileSystem(), self.fs)

    def fetch(self, name: str, target: Path) -> Path:
        """A local path to the content of the subfolder `name`: the folder itself if local, else a copy in `target`."""
        if self.local:
            return Path(self.join(name))
        target.mkdir(parents=True, exist_ok=True)
        fs.copy_files(self.join(name), str(target), self.fs, fs.LocalFileSystem())
        return target

    def move(self, source: str, target: str, marker: str | None = None) -> None:
        """Renames a file or folder. Object stores cannot rename: there a folder is copied and removed, its file
        `marker`, which says that it is complete, before the rest."""
        if self.local:
            self.fs.move(self.join(source), self.join(target))
            return
        fs.copy_files(self.join(source), self.join(target), self.fs, self.fs)
        if marker:
            self.remove(f"{source}/{marker}")
        self.fs.delete_dir(self.join(source))

    def remove(self, name: str) -> None:
        """Removes a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self.join(name))

    def delete(self, name: str) -> None:
        """Removes a subfolder, if it exists."""
        if self.exists(name):
            self.fs.delete_dir(self.join(name))
