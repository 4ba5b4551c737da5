"""The node-local cache: each shard decoded, resized and tokenised once into an Arrow IPC file, memory-mapped."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from raychain.data.health import Bad, tally
from raychain.data.reader import Reader
from raychain.data.room import NoRoomError, Room, create, share
from raychain.data.shards import Shard
from raychain.data.table import BAD, DamagedError, metadata, seal, verify

log = logging.getLogger("raychain.data")

PATIENCE_S = 30.0
"""How long a shard that is needed waits for room before it is decoded into memory."""
PAUSE_S = (0.02, 1.0)
"""Between two looks for room: at first, and at most."""
ASKED = 0.95
"""Share of a file's likely size that is asked for before the shard is decoded: not more than it turns out to take."""
FRAME = 4096
"""More than the bytes an Arrow file has besides its record batches: magic, schema, and the footer, which repeats it."""
FRAME_BATCH = 64
"""More than the footer's bytes for a record batch."""


class ShardCache:
    """Arrow files of decoded shards under `root`, at most `budget` bytes; safe to share between processes of a node."""

    def __init__(self, root: str | Path, budget: int) -> None:
        self.root = Path(root).expanduser()
        self.budget = budget
        (self.root / "shards").mkdir(parents=True, exist_ok=True)
        self._room = Room(self.root, budget)
        self._verified: set[tuple[int, ...]] = set()
        self._per_sample: dict[str, float] = {}

    def path(self, shard: Shard, reader: Reader) -> Path:
        """Where the shard's file is or will be."""
        return self.root / "shards" / f"{shard.identity}-{reader.digest}.arrow"

    def table(self, shard: Shard, reader: Reader) -> Any:
        """The shard's table, made now if it is not there; waits where another process of the node is making it.

        Where others hold the whole budget for PATIENCE_S seconds, the table is made in memory. Raises OSError for a
        shard that cannot be read or does not fit `budget`.
        """
        deadline, pause = time.monotonic() + PATIENCE_S, PAUSE_S[0]
        while (table := self.table_now(shard, reader)) is None:
            if time.monotonic() >= deadline:
                return self._in_memory(shard, reader)
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, PAUSE_S[1])
        return table

    def table_now(self, shard: Shard, reader: Reader) -> Any | None:
        """The table that `table` gives, or None where others hold too much of the budget."""
        path = self.path(shard, reader)
        while True:
            if (table := self._open(path, reader)) is not None:
                return table
            try:
                with self._make(path, shard, reader) as file:
                    fcntl.flock(file, fcntl.LOCK_SH)
                    if os.fstat(file.fileno()).st_nlink:  # not removed while the lock changed hands
                        return self._map(file, path.stem, reader)
            except _MadeElsewhere:
                continue
            except NoRoomError:
                return None

    @contextlib.contextmanager
    def turn(self, closed: threading.Event) -> Iterator[None]:
        """Only one process or thread of the node has its turn. Raises CancelledError when `closed` is set meanwhile."""
        with (self.root / "turn.lock").open("w") as file:
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if closed.wait(PAUSE_S[0]):
                    raise CancelledError
            yield

    def ensure(self, shard: Shard, reader: Reader, *, spare: float | None = None) -> int:
        """Makes the shard's file if it is not there and room can be made now, and does not hold it.

        Files used since `spare` (seconds of the epoch) do not make room. Returns the bytes written, 0 for none. Raises
        OSError as `table` does.
        """
        path = self.path(shard, reader)
        if self.touch(shard, reader):
            return 0
        try:
            with self._make(path, shard, reader, spare) as file:
                return os.fstat(file.fileno()).st_size
        except (_MadeElsewhere, NoRoomError):
            return 0

    def check_fits(self, shards: Sequence[Shard], reader: Reader) -> None:
        """Raises OSError if these shards, which are needed at once, are more than the budget; sizes of shards that are
        not made yet follow from those that are."""
        needed = sum(self.size(shard, reader) for shard in shards)
        if needed > self.budget:
            raise OSError(
                f"preload.budget is {self.budget} bytes; the {len(shards)} shards that are shuffled together need "
                f"about {needed}: raise it, or lower data.shuffle_window or data.lanes"
            )

    def size(self, shard: Shard, reader: Reader) -> int:
        """Bytes of the shard's file; while it is not there, what others of its kind make likely."""
        try:
            return self.path(shard, reader).stat().st_size
        except FileNotFoundError:
            return int(shard.samples * self._per_sample.get(reader.digest, reader.least_bytes))

    def touch(self, shard: Shard, reader: Reader) -> bool:
        """Marks the shard's file as just used; False if it is not there."""
        try:
            _used(self.path(shard, reader))
        except FileNotFoundError:
            return False
        return True

    def _open(self, path: Path, reader: Reader) -> Any | None:
        """The table of a file that is there and whole; a damaged one is removed."""
        if (file := share(path)) is None:
            return None
        with file:
            try:
                table = self._map(file, path.stem, reader)
                with contextlib.suppress(FileNotFoundError):  # another reader found it damaged
                    _used(path)
                return table
            except (DamagedError, pa.ArrowException, ValueError, KeyError, AttributeError) as error:
                log.warning("%s is damaged (%s): it is made again", path, str(error))
            self._room.remove(path, file)  # out of the handler, which still holds the mapping
            return None

    def _map(self, file: BinaryIO, name: str, reader: Reader) -> Any:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # holds the file's lock on its own
        stat = os.fstat(file.fileno())
        key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key not in self._verified:
            verify(content)
            self._verified.add(key)
        return reader.open(content, name)

    def _make(self, path: Path, shard: Shard, reader: Reader, spare: float | None = None) -> BinaryIO:
        """The finished file in its place, exclusively held. Raises _MadeElsewhere if another process was quicker, and
        NoRoomError."""
        started, scratch = time.monotonic(), path.with_suffix(".tmp")
        file = create(scratch)
        try:
            if path.exists():
                raise _MadeElsewhere

            def reserve(size: int) -> None:
                self._room.reserve(file, size, spare)

            reserve(int(shard.samples * max(reader.least_bytes, ASKED * self._per_sample.get(reader.digest, 0))))
            bad: list[Bad] = []
            batches = reader.decode(shard, bad)
            _write(pa.PythonFile(file, "w"), batches, metadata(path.stem, reader.kept), bad, reserve)
            file.truncate()
            with mmap.mmap(file.fileno(), 0) as content:
                seal(content)
            size = os.fstat(file.fileno()).st_size
            self._room.settle(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            file.close()
            raise
        self._per_sample[reader.digest] = size / shard.samples
        log.debug("cached %s: %d bytes in %.1f s", shard.address, size, time.monotonic() - started)
        return file

    def _in_memory(self, shard: Shard, reader: Reader) -> Any:
        name = self.path(shard, reader).stem
        log.warning(
            "%s: decoded into memory, since all of preload.budget (%d bytes) was in use for %g s; raise it, or lower "
            "data.shuffle_window or data.lanes", shard.address, self.budget, PATIENCE_S,
        )  # fmt: skip
        sink = pa.BufferOutputStream()
        bad: list[Bad] = []
        _write(sink, reader.decode(shard, bad), metadata(name, reader.kept), bad, lambda _: None)
        return reader.open(sink.getvalue(), name)


class _MadeElsewhere(Exception):  # noqa: N818 - nothing went wrong
    """The file is there already."""


def _used(path: Path) -> None:
    """Notes in the file's access time that it is used now."""
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _write(
    sink: Any,
    batches: Iterator[pa.RecordBatch],
    notes: dict[bytes, bytes],
    bad: Sequence[Bad],
    reserve: Callable[[int], None],
) -> None:
    """Writes an Arrow file that ends with an empty batch, whose metadata tells what `batches` has put into `bad`.

    Before every record batch `reserve` is told the bytes of the whole file so far.
    """
    writer, size, last = None, FRAME, None
    for batch in batches:
        size += pa.ipc.get_record_batch_size(batch) + FRAME_BATCH
        reserve(size)
        writer = writer or pa.ipc.new_file(sink, batch.schema.with_metadata(notes))
        writer.write_batch(batch)
        last = batch
    assert writer is not None, "a shard without samples is an error of decoding"
    assert last is not None
    found = json.dumps(tally(bad).record().content()).encode()
    reserve(size + pa.ipc.get_record_batch_size(last.slice(0, 0)) + FRAME_BATCH + len(found))
    writer.write_batch(last.slice(0, 0), custom_metadata={BAD: found})
    writer.close()
