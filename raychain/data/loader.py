"""Batches for one rank, assembled by threads ahead of the training loop from cached shards in the given order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from raychain.core.dist import rank_slice
from raychain.data import health
from raychain.data.cache import ShardCache
from raychain.data.health import Tally
from raychain.data.lanes import Part, dealt, needed, parts
from raychain.data.order import Lane, Stream, Window, extend, joined
from raychain.data.reader import Finishing, Joining, Reader, Table
from raychain.data.shards import Shard

AHEAD = 4
"""Batches kept ready."""
SHARDS_AHEAD = 8
"""Shards that a loader of several lanes decodes ahead: a lane's windows may be of one, and ranks that read the same
lane begin at different ones."""
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
    reader: Reader | None = None
    """What finishes them on a device, if it does."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.columns[name]

    def to(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The columns on a device, copied beside other work where they are pinned, as an objective reads them."""
        columns = {name: column.to(device, non_blocking=True) for name, column in self.columns.items()}
        return self.reader.finish(columns) if isinstance(self.reader, Finishing) else columns


@dataclass(frozen=True)
class Feed:
    """What a stage reads: shards in an order, and what turns their rows into batches."""

    shards: tuple[Shard, ...]
    order: Stream
    reader: Reader

    @property
    def together(self) -> int:
        """Samples of a batch that one rank reads."""
        return self.reader.together if isinstance(self.reader, Joining) else 1


class Ahead:
    """The windows of a lane from a place on, which only moves forward."""

    def __init__(self, lane: Lane, place: int, shards: int = 0) -> None:
        self._sources, self._coming, self._shards = lane.sources, lane.coming(place), shards
        self._windows: list[Window] = []

    def at(self, place: int) -> tuple[list[Window], list[Window]]:
        """The windows that `place` lies in, and those that follow, which have so many `shards` at the least."""
        extend(self._windows, self._coming, place + 1, self._sources, shards=self._shards)
        self._windows = [window for window in self._windows if window.stop > place]
        current = [window for window in self._windows if window.start <= place]
        return current, self._windows[len(current) :]


def lanes_of(order: Stream, global_batch: int, ranks: Sequence[int], world: int, together: int = 1) -> tuple[int, ...]:
    """The lanes that these ranks read, each whole groups of samples that belong `together`."""
    blocks = [rank_slice(global_batch, rank, world, together) for rank in ranks]
    found = {lane for block in blocks for lane in needed(order.lanes, global_batch, block.start, block.stop)}
    return tuple(sorted(found))


def shards_of(order: Stream, windows: Sequence[Window]) -> list[int]:
    """The shards of windows that have samples, each once."""
    return [s for s in dict.fromkeys(s for window in windows for s in window.shards) if order.counts[s]]


class Loader:
    """Iterates over the batches of steps `start` … `stop` for `rank` of `world`. Starts working when made.

    Use as a context manager, or call `close`. `wait_s` is the time the consumer spent waiting so far. A sample that
    turned out unusable when its shard was decoded is replaced by another of the same shard: the order counts samples as
    surveyed, and its row r is row r modulo the rows there are. So batches keep their size, and every rank makes the
    same choice. `report` hears of such shards whenever one is read; by default they are named in the log, once.

    It reads the lanes alone that its part of a batch is of. `node`: the ranks that share the cache; absent: this one.
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
        node: Sequence[int] = (),
        threads: int = 1,
        pin: bool = False,
        report: Callable[[Shard, Tally], None] = lambda shard, bad: health.name(shard.address, bad),
    ) -> None:
        self.feed, self.cache = feed, cache
        self.global_batch, self.start, self.stop, self.report = global_batch, start, stop, report
        self.slice = rank_slice(global_batch, rank, world, feed.together)
        self.pin, self.wait_s = pin, 0.0
        lanes = lanes_of(feed.order, global_batch, (rank,), world, feed.together)
        places = self._places(start)
        share = -(-SHARDS_AHEAD // max(1, len(lanes))) if feed.order.lanes > 1 else 0
        self._ahead = {lane: Ahead(feed.order.lane(lane), places[lane], share) for lane in lanes}
        self._node = lanes_of(feed.order, global_batch, node or (rank,), world, feed.together)
        self._turn = self.slice.start * feed.order.lanes / global_batch - min(lanes, default=0)
        """Where this rank's part begins in its lanes, in lanes."""
        self._tables: dict[int, Table] = {}
        self._ends: dict[int, int] = {}
        """Up to where in each lane the tables are enough."""
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        # ranks of one lane look far ahead: what is needed now does not stand in line behind what follows
        self._takers = ThreadPoolExecutor(self._threads, "take") if feed.order.lanes > 1 else self._pool
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
        for pool in (self._pool, self._takers):
            pool.shutdown(wait=False, cancel_futures=True)
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

    def _places(self, step: int) -> list[int]:
        """Where every lane is before a step."""
        return dealt(self.feed.order.lanes, step * self.global_batch).tolist()

    def _hold(self, places: Mapping[int, int], step: int) -> dict[int, int]:
        """Holds every table of the windows in which the lanes' places lie; returns up to where these are enough.

        Where room is scarce, one loader of the node at a time waits for it, and the others hold nothing, so that none
        waits for what another keeps while it waits.
        """
        if all(place < self._ends.get(lane, 0) for lane, place in places.items()):
            return self._ends
        ends: dict[int, int] = {}
        now: list[Window] = []
        soon: list[Window] = []
        for lane, place in places.items():
            current, following = self._ahead[lane].at(place)
            now += current
            soon += following
            ends[lane] = min(*(window.stop for window in current), *(window.start for window in following))
        shards = self._in_turn(now)
        held = set(shards)
        self._tables = {shard: table for shard, table in self._tables.items() if shard in held}
        if missing := [shard for shard in shards if shard not in self._tables]:
            together = self._together(shards, step)
            if not self._take(together, missing, self.cache.table_now):
                self._release()
                with self.cache.turn(self._closed):
                    self._take(together, [shard for shard in shards if shard not in self._tables], self.cache.table)
            for shard in self._in_turn(soon):  # files used from now on do not make room for these
                self._submit(self._pool, self.cache.ensure, shard, spare=time.time())
        self._ends = ends
        return ends

    def _together(self, own: list[int], step: int) -> list[int]:
        """What the node's ranks hold at a step: `own`, and the windows of the lanes that only others read."""
        order, before = self.feed.order, self._places(step)
        others = [lane for lane in self._node if lane not in self._ahead]
        windows = [w for lane in others for w in Ahead(order.lane(lane), before[lane]).at(before[lane])[0]]
        return list(dict.fromkeys([*own, *shards_of(order, windows)]))

    def _take(self, together: list[int], shards: list[int], get: Callable[..., Table | None]) -> bool:
        """Whether all of the tables could be got, which are part of those needed `together`."""
        self._check_fits(together)
        futures = [self._submit(self._takers, get, shard) for shard in shards]
        while wait(futures, timeout=POLL_S).not_done:
            if self._closed.is_set():
                raise CancelledError
            self._check_fits(together)
        tables = {shard: future.result() for shard, future in zip(shards, futures, strict=True)}
        for shard, table in tables.items():
            if table is not None and table.bad:
                self.report(self.feed.shards[shard], table.bad)
        self._tables |= {shard: table for shard, table in tables.items() if table is not None}
        return None not in tables.values()

    def _check_fits(self, together: list[int]) -> None:
        self.cache.check_fits([self.feed.shards[shard] for shard in together], self.feed.reader)

    def _release(self) -> None:
        """Lets the cache's files go."""
        self._ends = {}
        self._tables = {shard: table for shard, table in self._tables.items() if not table.mapped}

    def _in_turn(self, windows: list[Window]) -> list[int]:
        """Shards with samples; ranks that share their lanes start at different ones and share the work."""
        shards = shards_of(self.feed.order, windows)
        turn = int(self._turn * len(shards) / max(1, len(self._ahead)))
        return [*shards[turn:], *shards[:turn]]

    def _submit(self, pool: ThreadPoolExecutor, work: Callable[..., T], shard: int, **options: Any) -> Future[T]:
        if self._closed.is_set():
            raise CancelledError
        return pool.submit(work, self.feed.shards[shard], self.feed.reader, **options)

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
        """The rank's part of a global batch. Where a lane comes to its next window within it, what stands in the
        windows so far is read first: only what one window of every lane needs is held at a time.
        """
        order, begin = self.feed.order, step * self.global_batch
        left = parts(order.lanes, begin, begin + self.global_batch, self.slice)
        slots = dict(zip((part.lane for part in left), _offsets(left), strict=True))
        places = {lane: place for lane, place in enumerate(self._places(step)) if lane in self._ahead}
        places |= {part.lane: part.start for part in left}
        read: list[dict[str, np.ndarray]] = []
        where: list[np.ndarray] = []
        while left:
            ends = self._hold(places, step)
            now = [part._replace(stop=min(part.stop, ends[part.lane])) for part in left]
            rows = joined([order.lane(lane).rows(start, stop) for lane, start, stop in now])
            read.append(self.feed.reader.read(rows, self._tables, order.seed, self._share))
            where += [slots[part.lane] + np.arange(part.start, part.stop) for part in now]
            places |= {part.lane: part.stop for part in now}
            left = [part._replace(start=places[part.lane]) for part in left if part.stop > places[part.lane]]
        arrays = {name: _placed([part[name] for part in read], where) for name in read[0]}
        if isinstance(self.feed.reader, Joining):
            arrays = self.feed.reader.join(arrays)
        columns = {name: torch.from_numpy(array) for name, array in arrays.items()}
        pinned = {name: column.pin_memory() for name, column in columns.items()} if self.pin else columns
        return Batch(step, pinned, self.feed.reader)

    def _share(self, work: Callable[[int, int], None]) -> None:
        parts = self._threads
        if parts == 1:
            work(0, 1)
        else:
            list(self._readers.map(lambda part: work(part, parts), range(parts)))


def _offsets(of: Sequence[Part]) -> list[int]:
    """What takes a place in a part's lane to its place in the batch, in which the parts follow one another."""
    sizes = [part.stop - part.start for part in of]
    return [sum(sizes[:i]) - part.start for i, part in enumerate(of)]


def _placed(columns: list[np.ndarray], where: Sequence[np.ndarray]) -> np.ndarray:
    """One column out of several, whose values belong at the places `where`."""
    if len(columns) == 1:
        return columns[0]
    whole, places = np.concatenate(columns), np.concatenate(where)
    return whole if (np.diff(places) > 0).all() else whole[np.argsort(places)]
