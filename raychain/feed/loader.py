"""Batches for one rank, assembled by threads ahead of the training loop from cached shards in the given order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from raychain.feed import health
from raychain.feed.cache import ShardCache, Spec, Table, Tokenize
from raychain.feed.health import Tally
from raychain.feed.order import Rows, Stream, Window, draw_captions, extend, mix, rank_slice
from raychain.feed.shards import Shard

AHEAD = 4
"""Batches kept ready."""
POLL_S = 0.2
"""How often waiting threads look whether the loader was closed."""
CROP_THREADS_FROM = 96
"""Pixels a side from which random crops are shared out to threads; below, Python's lock costs more than they gain."""


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    step: int
    images: torch.Tensor
    """uint8 [b, H, W, 3]."""
    tokens: torch.Tensor
    """int64 [b, K, context length]."""


@dataclass(frozen=True)
class Feed:
    """What a stage reads: shards in an order, with the recipe that turns a row into a picture and captions."""

    shards: tuple[Shard, ...]
    order: Stream
    spec: Spec
    per_image: int
    crop: tuple[float, float] | None = None


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
        tokenize: Tokenize,
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
        self.feed, self.cache, self.tokenize = feed, cache, tokenize
        self.global_batch, self.start, self.stop, self.report = global_batch, start, stop, report
        self.slice = rank_slice(global_batch, rank, world)
        self.rank, self.world, self.pin, self.wait_s = rank, world, pin, 0.0
        self._tables: dict[int, Future[Table]] = {}
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        self._croppers = ThreadPoolExecutor(self._threads, thread_name_prefix="crop")
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
        self._croppers.shutdown()
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
            coming = self.feed.order.coming(self.start * self.global_batch)
            ahead: list[Window] = []
            for step in range(self.start, self.stop):
                stop = (step + 1) * self.global_batch
                for window in extend(ahead, coming, stop, self.feed.order.sources):
                    self._prepare(window.shards)
                rows = self.feed.order.rows(step * self.global_batch, stop)
                if not self._put(self._batch(step, Rows(*(column[self.slice] for column in rows)))):
                    return
                ahead = [window for window in ahead if window.stop > stop]
                needed = {shard for window in ahead for shard in window.shards}
                for shard in self._tables.keys() - needed:
                    del self._tables[shard]
            self._put(None)
        except CancelledError:  # closed
            return
        except BaseException as error:  # handed to the training loop, which raises it
            self._put(error)

    def _prepare(self, shards: Sequence[int]) -> None:
        turn = self.rank * len(shards) // self.world  # ranks of a node start at different shards and share the work
        for shard in (*shards[turn:], *shards[:turn]):
            if shard not in self._tables and self.feed.order.counts[shard]:
                if self._closed.is_set():
                    raise CancelledError
                self._tables[shard] = self._pool.submit(self._read, self.feed.shards[shard])

    def _read(self, shard: Shard) -> Table:
        table = self.cache.table(shard, self.feed.spec, self.tokenize)
        if table.bad:
            self.report(shard, table.bad)
        return table

    def _put(self, item: Batch | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=POLL_S)
                return True
            except queue.Full:
                continue
        return False

    def _table(self, shard: int) -> Table:
        while not self._closed.is_set():
            if wait([self._tables[shard]], timeout=POLL_S).done:
                return self._tables[shard].result()
        raise CancelledError

    def _batch(self, step: int, rows: Rows) -> Batch:
        feed, tables = self.feed, {s: self._table(s) for s in np.unique(rows.shard).tolist()}
        place = [(tables[s], r % tables[s].size) for s, r in zip(rows.shard.tolist(), rows.row.tolist(), strict=True)]
        size = feed.spec.image_size
        images = np.empty((len(place), size, size, 3), dtype=np.uint8)
        boxes = mix(feed.order.seed, rows.passes, rows.shard, rows.row, 1 << 20)
        first = np.array([table.caption_offset[r] for table, r in place])
        pool = np.array([table.caption_offset[r + 1] for table, r in place]) - first
        chosen = first[:, None] + draw_captions(feed.order.seed, rows, pool, feed.per_image)
        tokens = np.empty((*chosen.shape, place[0][0].tokens.shape[1]), dtype=np.int64)
        for i, (table, r) in enumerate(place):
            tokens[i] = table.tokens[chosen[i]]
            if feed.crop is None:
                images[i] = table.image(r)
        if feed.crop is not None:
            area, parts = feed.crop, self._threads if size >= CROP_THREADS_FROM else 1

            def crop(part: int) -> None:
                for i in range(part, len(place), parts):
                    table, r = place[i]
                    images[i] = random_crop(table.image(r), size, area, int(boxes[i]))

            list(self._croppers.map(crop, range(parts)))
        batch = Batch(step, torch.from_numpy(images), torch.from_numpy(tokens))
        return Batch(step, batch.images.pin_memory(), batch.tokens.pin_memory()) if self.pin else batch


def random_crop(image: np.ndarray, size: int, area: tuple[float, float], seed: int) -> np.ndarray:
    """torchvision's RandomResizedCrop (ratio 3/4 … 4/3, bicubic) of a uint8 [H, W, 3], decided by `seed` alone."""
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]
    for _ in range(10):
        pixels = height * width * rng.uniform(*area)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((pixels * ratio) ** 0.5), round((pixels / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    box = (left, top, left + w, top + h)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))
