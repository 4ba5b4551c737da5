"""Addresses: local paths and object storage behind pyarrow's one filesystem interface."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from raychain.errors import InputError

log = logging.getLogger("raychain.storage")
RETRIES_S = (1, 2, 4, 8, 15, 30)
T = TypeVar("T")


def patiently(work: Callable[[], T]) -> T:
    """`work()`, which may be tried again after an OSError: a full disk that is cleared, storage that is back in a
    minute. The last error is raised.
    """
    for pause in RETRIES_S:
        try:
            return work()
        except OSError as error:
            log.warning("storage: %s; trying again in %d s", error, pause)
            time.sleep(pause)
    return work()


def is_local(address: str) -> bool:
    """Whether `address` is a path of this machine."""
    return "://" not in address or address.startswith("file://")


def resolve(address: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of `address` and the path on it. Paths are made absolute; `~` is expanded.

    s3://, gs://, hdfs:// and file:// go through pyarrow, every other scheme through fsspec.
    Raises InputError for a scheme neither knows.
    """
    if "://" not in address:
        return fs.LocalFileSystem(), str(Path(address).expanduser().absolute())
    try:
        return fs.FileSystem.from_uri(address)
    except (OSError, ValueError, NotImplementedError):
        scheme = address.partition("://")[0]
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError, OSError) as error:
        raise InputError("address", address, f"s3://, gs://, a path, or what fsspec knows ({error})",
                         f"correct {scheme}:// or install its fsspec driver") from None  # fmt: skip
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


class Folder:
    """A folder at an address. Files appear whole or not at all: written beside and renamed, or put in one piece."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.local = is_local(address)
        self.fs, self.path = resolve(address)

    def join(self, name: str) -> str:
        """Path of `name` on this folder's filesystem."""
        return f"{self.path}/{name}" if name else self.path

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of that name."""
        return self.fs.get_file_info(self.join(name)).type != fs.FileType.NotFound

    def list(self, name: str = "") -> list[str]:
        """Names in the subfolder `name`, sorted; none if it does not exist."""
        infos = self.fs.get_file_info(fs.FileSelector(self.join(name), allow_not_found=True))
        return sorted(info.base_name for info in infos)

    def read(self, name: str) -> bytes | None:
        """Content of a file, or None if it does not exist."""
        if not self.exists(name):
            return None
        with self.fs.open_input_stream(self.join(name)) as stream:
            return stream.read()

    def write(self, name: str, content: bytes) -> None:
        """Writes a file atomically, making folders as needed."""
        target = self.join(name)
        self.fs.create_dir(target.rpartition("/")[0], recursive=True)
        scratch = f"{target}.{uuid.uuid4().hex[:8]}.tmp" if self.local else target
        with self.fs.open_output_stream(scratch) as stream:
            stream.write(content)
        if self.local:
            os.replace(scratch, target)  # noqa: PTH105 - both are plain strings of the filesystem

    def read_json(self, name: str) -> Any:
        """A JSON file's content; None if it does not exist or is not JSON (half-written by something else)."""
        content = self.read(name)
        try:
            return None if content is None else json.loads(content)
        except ValueError:
            return None

    def write_json(self, name: str, value: Any) -> None:
        """Writes `value` as JSON, atomically."""
        self.write(name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def publish(self, source: Path, name: str, marker: str) -> None:
        """Copies a local folder to `name`; the file `marker` goes last and says that the folder is complete."""
        self.fs.create_dir(self.join(name), recursive=True)
        for path in sorted(source.rglob("*"), key=lambda p: p.name == marker):
            if path.is_file():
                relative = f"{name}/{path.relative_to(source).as_posix()}"
                if path.name == marker:
                    self.write(relative, path.read_bytes())
                else:
                    self.fs.create_dir(self.join(relative).rpartition("/")[0], recursive=True)
                    fs.copy_files(str(path), self.join(relative), fs.LocalFileSystem(), self.fs)

    def fetch(self, name: str, target: Path) -> Path:
        """A local path to the content of the subfolder `name`: the folder itself if local, else a copy in `target`."""
        if self.local:
            return Path(self.join(name))
        target.mkdir(parents=True, exist_ok=True)
        fs.copy_files(self.join(name), str(target), self.fs, fs.LocalFileSystem())
        return target

    def move(self, source: str, target: str) -> None:
        """Renames a file or folder."""
        if self.local:
            self.fs.move(self.join(source), self.join(target))
            return
        fs.copy_files(self.join(source), self.join(target), self.fs, self.fs)  # object stores cannot rename folders
        self.fs.delete_dir(self.join(source))

    def delete(self, name: str) -> None:
        """Removes a subfolder, if it exists."""
        if self.exists(name):
            self.fs.delete_dir(self.join(name))
