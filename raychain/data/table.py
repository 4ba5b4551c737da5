"""A cached shard: an Arrow IPC file whose schema carries its name and a checksum of every other byte."""

from __future__ import annotations

import ctypes
import json
import mmap

import numpy as np
import pyarrow as pa
import torch
import xxhash

from raychain.data.decode import from_jpeg
from raychain.data.health import Tally
from raychain.records import TallyRecord

SEAL = b"xxh3-128:"
BLANK = b"0" * 32
"""Stands for the digest until the file is complete; as long as the digest in hexadecimal."""
BAD = b"raychain.bad"
"""In the metadata of a file's last batch: its Tally."""
HEAD = 65_536
"""The seal stands within this many bytes from the start."""


class DamagedError(Exception):
    """The file is not, or no longer, what was written under its name."""


def metadata(name: str, pixels: str) -> dict[bytes, bytes]:
    """The schema's metadata of a file that is to be sealed."""
    return {b"name": name.encode(), b"pixels": pixels.encode(), b"seal": SEAL + BLANK}


def seal(content: mmap.mmap) -> None:
    """Writes the digest of a complete file into its place."""
    place = content.find(SEAL, 0, HEAD) + len(SEAL)
    content[place : place + len(BLANK)] = _digest(memoryview(content), place)


def verify(content: mmap.mmap) -> None:
    """Reads the whole file, at the speed of memory. Raises DamagedError where a byte is not what was written."""
    place = content.find(SEAL, 0, HEAD) + len(SEAL)
    if place < len(SEAL) or content[place : place + len(BLANK)] != _digest(memoryview(content), place):
        raise DamagedError("its checksum does not match")


def _digest(content: memoryview, place: int) -> bytes:
    checksum = xxhash.xxh3_128(content[:place])
    checksum.update(content[place + len(BLANK) :])
    return checksum.hexdigest().encode()


class CachedShard:
    """The Arrow file of a cached shard. While one is alive the file is held: the cache does not remove it."""

    def __init__(self, content: mmap.mmap | pa.Buffer, name: str) -> None:
        buffer = pa.py_buffer(content)
        reader = pa.ipc.open_file(pa.BufferReader(buffer))
        self.data = data = reader.read_all()
        """The batches that the reader's `decode` gave, and an empty one at the end."""
        if data.schema.metadata.get(b"name") != name.encode():
            raise DamagedError("it is another shard's")
        self.mapped = isinstance(content, mmap.mmap)
        """Whether it holds a file, not memory."""
        self.size = data.num_rows
        notes = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1).custom_metadata
        found = Tally.of(TallyRecord.of(json.loads(notes[BAD])))
        self.bad, self.noted = found.part(used=False), found.part(used=True)
        """Samples that turned out unusable and have no row, and those that have one and are worth a word."""


class Table(CachedShard):
    """Numpy views of the pictures of a cached shard, and of their captions and labels."""

    def __init__(self, content: mmap.mmap | pa.Buffer, name: str) -> None:
        super().__init__(content, name)
        data, buffer = self.data, pa.py_buffer(content)
        self._jpeg = data.schema.metadata[b"pixels"] == b"jpeg"
        captions = data.column("captions").combine_chunks()
        self.caption_offset = captions.offsets.to_numpy()
        self.label = data.column("label").to_numpy()
        self.height = data.column("height").to_numpy()
        self.width = data.column("width").to_numpy()
        tokens = captions.values
        self.tokens = np.frombuffer(tokens.buffers()[1] or b"", dtype=np.int32)
        self.tokens = self.tokens.reshape(len(tokens), tokens.type.byte_width // 4)
        self._content = np.frombuffer(buffer, dtype=np.uint8)
        spans = [_spans(chunk, buffer.address) for chunk in data.column("image").chunks if len(chunk)]
        self._start, self._stop = np.concatenate(spans, axis=1)
        # of no array, which would be read-only, and torch would warn of that; nothing is written through it
        bytes_n = (ctypes.c_uint8 * buffer.size).from_address(buffer.address)
        self._bytes, self._held = torch.from_numpy(np.ctypeslib.as_array(bytes_n)), buffer

    def classes(self, rows: range) -> np.ndarray:
        """uint8 [rows, classes]: a one for each class that a picture shows. They are there where they were wanted."""
        held = self.data.column("classes").slice(rows.start, len(rows)).to_pylist()
        return np.stack([np.frombuffer(row, np.uint8) for row in held])

    def image(self, row: int) -> np.ndarray:
        """uint8 [height, width, 3]; a read-only view where pixels are kept raw."""
        content = self._content[self._start[row] : self._stop[row]]
        if self._jpeg:
            return from_jpeg(content)
        return content.reshape(self.height[row], self.width[row], 3)

    def window(self, row: int, top: int, left: int, height: int, width: int) -> torch.Tensor:
        """uint8 [1, 3, height, width], channels last: a part of a picture. To be read, while the table is held."""
        line = 3 * int(self.width[row])
        strides, begin = (line * int(self.height[row]), 1, line, 3), top * line + 3 * left
        if self._jpeg:
            pixels, start = torch.from_numpy(self.image(row)), 0
        else:
            pixels, start = self._bytes, int(self._start[row])
        return pixels.as_strided((1, 3, height, width), strides, start + begin)


def _spans(images: pa.LargeBinaryArray, origin: int) -> np.ndarray:
    """First and last byte of each picture, int64 [2, pictures], counted from the address `origin`."""
    _, offsets, content = images.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[: len(images) + 1] + (content.address - origin)
    return np.stack([ends[:-1], ends[1:]])
