"""Batches for one rank, assembled by threads ahead of the training loop from cached shards in the given order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from raychain.core.dist import rank_slice
from raychain.data import health
from raychain.data.cache import ShardCache
from raychain.data.health import Tally
from raychain.data.order import Stream, Window, extend
from raychain.data.reader import Reader, Table
from raychain.data.shards import Shard

AHEAD = 4
"""Batches kept ready."""
POLL_S = 0.2
"""How often waiting threads look whether the loader was closed."""
IDLE_S = 1.0
"""After so long with all batches ready the cached shards are let go, for others that need room in the cache."""
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    step: int
    columns: dict[str, torch.Tensor]
    """The reader's columns, each [b, …]."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.columns[name]

    def to(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The columns on a device, copied beside other work where they are pinned."""
        return {name: column.to(device, non_blocking=True) for name, column in self.columns.items()}


@dataclass(frozen=True)
class Feed:
    """What a stage reads: shards in an order, and what turns their rows into batches."""

    shards: tuple[Shard, ...]
    order: Stream
    reader: Reader


class Loader:
    """Iterates over the batches of steps `start` … `stop` for `rank` of `world`. Starts working when made.

    Use as a context manager, or call `close`. `wait_s` is the time the consumer spent waiting so far. A sample that
    turned out unusable when its shard was decoded is replaced by another of the same shard: the order counts samples as
    surveyed, and its row r is row r modulo the rows there are. So batches keep their size, and every rank makes the
    same choice. `report` hears of such shards whenever one is read; by default they are named in the log, once.
    """

    def __init__(
        self,
        feed: Feed,
        cache: ShardCache,
        *,
        global_batch: int,
        start: int,
        stop: int,
        rank: int = 0,
        world: int = 1,
        threads: int = 1,
        pin: bool = False,
        report: Callable[[Shard, Tally], None] = lambda shard, bad: health.name(shard.address, bad),
    ) -> None:
        self.feed, self.cache = feed, cache
        self.global_batch, self.start, self.stop, self.report = global_batch, start, stop, report
        self.slice = rank_slice(global_batch, rank, world)
        self.rank, self.world, self.pin, self.wait_s = rank, world, pin, 0.0
        self._tables: dict[int, Table] = {}
        self._coming = feed.order.coming(start * global_batch)
        self._ahead: list[Window] = []
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        self._readers = ThreadPoolExecutor(self._threads, thread_name_prefix="read")
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the threads and drops what was prepared. A shard that is being decoded goes on into the cache."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._thread.join()
        self._readers.shutdown()
        self._tables.clear()
        while not self._queue.empty():
            self._queue.get_nowait()

    def __iter__(self) -> Iterator[Batch]:
        while (item := self._next()) is not None:
            yield item

    def _next(self) -> Batch | None:
        started = time.perf_counter()
        while True:
            working = self._thread.is_alive()  # asked before the queue is: what it put last must be seen
            try:
                item = self._queue.get(timeout=POLL_S if working else 0)
                break
            except queue.Empty:
                if not working:
                    return None
        self.wait_s += time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        return item

    def _work(self) -> None:
        try:
            for step in range(self.start, self.stop):
                if not self._put(self._batch(step)):
                    return
            self._tables = {}  # the consumer may do much before it closes
            self._put(None)
        except CancelledError:  # closed
            return
        except BaseException as error:  # handed to the training loop, which raises it
            self._put(error)

    def _hold(self, place: int) -> int:
        """Holds every table of the windows that `place` lies in; returns the place up to which these are enough.

        Where room is scarce, one loader of the node at a time waits for it, and the others hold nothing, so that none
        waits for what another keeps while it waits.
        """
        extend(self._ahead, self._coming, place + 1, self.feed.order.sources)
        self._ahead = [window for window in self._ahead if window.stop > place]
        current = [window for window in self._ahead if window.start <= place]
        following = self._ahead[len(current) :]
        shards = self._in_turn(current)
        self._tables = {shard: table for shard, table in self._tables.items() if shard in shards}
        if missing := [shard for shard in shards if shard not in self._tables]:
            if not self._take(shards, missing, self.cache.table_now):
                self._release()
                with self.cache.turn(self._closed):
                    self._take(shards, [shard for shard in shards if shard not in self._tables], self.cache.table)
            for shard in self._in_turn(following):  # files used from now on do not make room for these
                self._submit(self.cache.ensure, shard, spare=time.time())
        return min(*(window.stop for window in current), *(window.start for window in following))

    def _take(self, together: list[int], shards: list[int], get: Callable[..., Table | None]) -> bool:
        """Whether all of the tables could be got, which are part of those needed `together`."""
        futures = [self._submit(get, shard) for shard in shards]
        while wait(futures, timeout=POLL_S).not_done:
            if self._closed.is_set():
                raise CancelledError
            self.cache.check_fits([self.feed.shards[shard] for shard in together], self.feed.reader)
        tables = {shard: future.result() for shard, future in zip(shards, futures, strict=True)}
        for shard, table in tables.items():
            if table is not None and table.bad:
                self.report(self.feed.shards[shard], table.bad)
        self._tables |= {shard: table for shard, table in tables.items() if table is not None}
        return None not in tables.values()

    def _release(self) -> None:
        """Lets the cache's files go."""
        self._tables = {shard: table for shard, table in self._tables.items() if not table.mapped}

    def _in_turn(self, windows: list[Window]) -> list[int]:
        """Shards with samples; ranks of a node start at different ones and share the work."""
        shards = [s for s in dict.fromkeys(s for window in windows for s in window.shards) if self.feed.order.counts[s]]
        turn = self.rank * len(shards) // self.world
        return [*shards[turn:], *shards[:turn]]

    def _submit(self, work: Callable[..., T], shard: int, **options: Any) -> Future[T]:
        if self._closed.is_set():
            raise CancelledError
        return self._pool.submit(work, self.feed.shards[shard], self.feed.reader, **options)

    def _put(self, item: Batch | BaseException | None) -> bool:
        started = time.monotonic()
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=POLL_S)
                return True
            except queue.Full:
                if time.monotonic() - started >= IDLE_S:
                    self._release()
        return False

    def _batch(self, step: int) -> Batch:
        """The rank's part of a global batch, one window after the other: only what one needs is held at a time."""
        place, stop = (step * self.global_batch + edge for edge in (self.slice.start, self.slice.stop))
        parts: list[dict[str, np.ndarray]] = []
        while place < stop:
            end = min(stop, self._hold(place))
            rows = self.feed.order.rows(place, end)
            parts.append(self.feed.reader.read(rows, self._tables, self.feed.order.seed, self._share))
            place = end
        columns = {name: _joined([part[name] for part in parts]) for name in parts[0]}
        return Batch(step, {name: c.pin_memory() for name, c in columns.items()} if self.pin else columns)

    def _share(self, work: Callable[[int, int], None]) -> None:
        parts = self._threads
        if parts == 1:
            work(0, 1)
        else:
            list(self._readers.map(lambda part: work(part, parts), range(parts)))


def _joined(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))
