"""The node-local cache: each shard decoded, resized and tokenised once into an Arrow IPC file, memory-mapped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from raychain.feed import members
from raychain.feed.decode import _decode
from raychain.feed.shards import Shard

log = logging.getLogger("raychain.feed")

Tokenize = Callable[[Sequence[str]], np.ndarray]
"""Captions → token ids, integer [captions, context length], padded."""

FORMAT = 1


@dataclass(frozen=True)
class Spec:
    """What a cached shard holds; shards of different specs are different files."""

    wanted: members.Wanted
    image_size: int
    tokenizer: str
    """Identity of the tokeniser: name, vocabulary, context length."""
    cropped: bool = False
    """Keep the whole picture for random crops instead of the resized centre."""

    @property
    def digest(self) -> str:
        """Content address of the spec."""
        text = f"{FORMAT}|{self.wanted.digest}|{self.image_size}|{self.tokenizer}|{self.cropped}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Table:
    """A cached shard: numpy views of the memory-mapped file."""

    def __init__(self, path: Path) -> None:
        self.data = pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()
        self.size = self.data.num_rows
        captions = self._column("captions")
        self.caption_offset = captions.offsets.to_numpy()
        self.label = self._column("label").to_numpy()
        self.height = self._column("height").to_numpy()
        self.width = self._column("width").to_numpy()
        tokens = captions.values
        self.tokens = np.frombuffer(tokens.buffers()[1] or b"", dtype=np.int32)
        self.tokens = self.tokens.reshape(len(tokens), tokens.type.byte_width // 4)
        pixels = self._column("image")
        self._pixel_offset = np.frombuffer(pixels.buffers()[1], dtype=np.int64)
        self._pixels = np.frombuffer(pixels.buffers()[2], dtype=np.uint8)

    def _column(self, name: str) -> pa.Array:
        column = self.data.column(name)
        return column.chunk(0) if column.num_chunks else pa.array([], column.type)

    def image(self, row: int) -> np.ndarray:
        """uint8 [height, width, 3], a read-only view."""
        pixels = self._pixels[self._pixel_offset[row] : self._pixel_offset[row + 1]]
        return pixels.reshape(self.height[row], self.width[row], 3)


class ShardCache:
    """Arrow files of decoded shards under `root`, at most `budget` bytes; safe to share between processes of a node."""

    def __init__(self, root: str | Path, budget: int) -> None:
        self.root = Path(root).expanduser()
        self.budget = budget
        (self.root / "shards").mkdir(parents=True, exist_ok=True)

    def path(self, shard: Shard, spec: Spec) -> Path:
        """Where the shard's file is or will be."""
        return self.root / "shards" / f"{shard.identity}-{spec.digest}.arrow"

    def table(self, shard: Shard, spec: Spec, tokenize: Tokenize) -> Table:
        """The shard's table, made now if it is not there; waits where another process of the node is making it.

        Raises OSError for a shard that cannot be read or does not fit `budget`.
        """
        path = self.path(shard, spec)
        for _ in range(3):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
                return Table(path)
            with _lock(path.with_suffix(".lock")):
                if not path.exists():
                    self._make(path, shard, spec, tokenize)
        raise OSError(f"{path} vanishes as soon as it is made: preload.budget ({self.budget} bytes) is too small")

    def _make(self, path: Path, shard: Shard, spec: Spec, tokenize: Tokenize) -> None:
        started, scratch = time.monotonic(), path.with_suffix(".tmp")
        try:
            with tempfile.TemporaryFile(dir=self.root) as pixels:
                table = _decode(shard, spec, tokenize, pixels)
                with pa.OSFile(str(scratch), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table)
            with _lock(self.root / "room.lock"):
                self._make_room(scratch.stat().st_size)
                scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        log.debug("cached %s: %d samples in %.1f s", shard.address, table.num_rows, time.monotonic() - started)

    def _make_room(self, incoming: int) -> None:
        if incoming > self.budget:
            raise OSError(f"preload.budget is {self.budget} bytes; one decoded shard needs {incoming}")
        files = []
        for path in (self.root / "shards").glob("*.arrow"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        held = incoming + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if held <= self.budget:
                return
            path.unlink(missing_ok=True)  # readers that have it mapped keep their pages
            held -= size


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
