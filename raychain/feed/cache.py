"""The node-local cache: each shard decoded, resized and tokenised once into an Arrow IPC file, memory-mapped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from PIL import Image

from raychain.feed import members, shards
from raychain.feed.shards import Shard

log = logging.getLogger("raychain.feed")

Tokenize = Callable[[Sequence[str]], np.ndarray]
"""Captions → token ids, integer [captions, context length], padded."""

FORMAT = 1
STORED_BEYOND_CROP = 1.15
"""With random crops the whole picture is kept, its shorter side this much larger than the crop's output."""


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

    def size(self, shard: Shard, spec: Spec) -> int:
        """Bytes of the shard's file; estimated from its samples while it is not there."""
        try:
            return self.path(shard, spec).stat().st_size
        except FileNotFoundError:
            return shard.samples * 3 * spec.image_size**2

    def touch(self, shard: Shard, spec: Spec) -> bool:
        """Marks the shard's file as just used; False if it is not there."""
        try:
            os.utime(self.path(shard, spec))
        except FileNotFoundError:
            return False
        return True

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


def _decode(shard: Shard, spec: Spec, tokenize: Tokenize, pixels: IO[bytes]) -> pa.Table:
    """The decoded shard; its pixels, gigabytes for thousands of large pictures, lie in the scratch file `pixels`."""
    keys: list[str] = []
    sizes: list[tuple[int, int]] = []
    labels: list[int] = []
    texts: list[list[str]] = []
    broken: list[str] = []
    for sample in shards.read(shard, spec.wanted):
        try:
            image = resize(members.picture(sample), spec.image_size, spec.cropped)
            captions = members.captions(sample, spec.wanted.captions)
            label = int(sample["cls"]) if spec.wanted.label else -1
            if spec.wanted.captions and not captions:
                raise ValueError("no caption")
        except Exception as error:  # damaged pictures raise nearly anything in Pillow
            broken.append(f"{sample['key']} ({error})")
            continue
        keys.append(sample["key"])
        pixels.write(image.tobytes())
        sizes.append(image.shape[:2])
        labels.append(label)
        texts.append(captions)
    if broken:
        log.warning("%s: %d unusable samples skipped: %s", shard.address, len(broken), ", ".join(broken[:5]))
    if not keys:
        raise OSError(f"{shard.address}: none of its {shard.samples} samples can be read")
    pixels.flush()
    ends = np.cumsum([0, *(h * w * 3 for h, w in sizes)], dtype=np.int64)
    images = [None, pa.py_buffer(ends), pa.py_buffer(np.memmap(pixels, mode="r"))]
    tokens = _tokens([text for pool in texts for text in pool], tokenize)
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    return pa.table(
        {
            "key": pa.array(keys),
            "image": pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(keys), images),
            "height": pa.array([h for h, _ in sizes], pa.int32()),
            "width": pa.array([w for _, w in sizes], pa.int32()),
            "label": pa.array(labels, pa.int32()),
            "captions": pa.ListArray.from_arrays(offsets, tokens),
        }
    )


def _tokens(texts: list[str], tokenize: Tokenize) -> pa.Array:
    distinct = list(dict.fromkeys(texts))
    ids = tokenize(distinct).astype(np.int32) if distinct else np.zeros((0, 1), np.int32)
    place = {text: i for i, text in enumerate(distinct)}
    rows = ids[[place[text] for text in texts]] if texts else ids
    width = rows.shape[1] * 4
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))]
    )


def resize(encoded: bytes, size: int, whole: bool = False) -> np.ndarray:
    """A picture as uint8 [H, W, 3]: shorter side resized to `size` (bicubic, as open_clip's evaluation does), centre
    cropped to a square; with `whole` the full picture, its shorter side STORED_BEYOND_CROP × `size` at most."""
    image: Image.Image = Image.open(io.BytesIO(encoded))
    short = round(size * STORED_BEYOND_CROP) if whole else size
    if "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as below, without Pillow's warning
    if image.format == "JPEG":  # decode at 1/2, 1/4 or 1/8 where that still leaves twice the pixels that are wanted
        image.draft("RGB", (2 * short, 2 * short))
    image = image.convert("RGB")
    width, height = image.size
    if whole and min(width, height) <= short:
        return np.asarray(image)
    scaled = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    if not whole:
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)
