"""Batches for one rank, assembled by threads ahead of the training loop from cached shards in the given order."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from raychain.feed.cache import ShardCache, Spec, Table, Tokenize
from raychain.feed.order import Order, Rows, draw_captions, mix, rank_slice
from raychain.feed.shards import Shard

AHEAD = 4
"""Batches kept ready."""


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
    order: Order
    spec: Spec
    per_image: int
    crop: tuple[float, float] | None = None


class Loader:
    """Iterates over the batches of steps `start` … `stop` for `rank` of `world`. Starts working when made.

    Use as a context manager, or call `close`. `wait_s` is the time the consumer spent waiting so far.
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
    ) -> None:
        self.feed, self.cache, self.tokenize = feed, cache, tokenize
        self.global_batch, self.start, self.stop = global_batch, start, stop
        self.slice = rank_slice(global_batch, rank, world)
        self.rank, self.world, self.pin, self.wait_s = rank, world, pin, 0.0
        self._tables: dict[int, Future[Table]] = {}
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="decode")
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the threads and drops what was prepared."""
        self._closed.set()
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(0.05)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._tables.clear()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            item = self._queue.get()
            self.wait_s += time.perf_counter() - started
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item

    def _work(self) -> None:
        try:
            coming = self.feed.order.coming(self.start * self.global_batch)
            ahead: deque[tuple[int, tuple[int, ...]]] = deque()
            for step in range(self.start, self.stop):
                stop = (step + 1) * self.global_batch
                while len(ahead) < 2 or ahead[-2][0] < stop:  # the windows this batch needs and one more
                    ahead.append(next(coming))
                    self._prepare(ahead[-1][1])
                rows = self.feed.order.rows(step * self.global_batch, stop)
                if not self._put(self._batch(step, Rows(*(column[self.slice] for column in rows)))):
                    return
                while ahead[0][0] <= stop:
                    ahead.popleft()
                needed = {shard for _, shards in ahead for shard in shards}
                for shard in self._tables.keys() - needed:
                    del self._tables[shard]
            self._put(None)
        except BaseException as error:  # handed to the training loop, which raises it
            self._put(error)

    def _prepare(self, shards: Sequence[int]) -> None:
        turn = self.rank * len(shards) // self.world  # ranks of a node start at different shards and share the work
        for shard in (*shards[turn:], *shards[:turn]):
            if shard not in self._tables:
                self._tables[shard] = self._pool.submit(
                    self.cache.table, self.feed.shards[shard], self.feed.spec, self.tokenize
                )

    def _put(self, item: Batch | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _batch(self, step: int, rows: Rows) -> Batch:
        feed, tables = self.feed, {s: self._tables[s].result() for s in set(rows.shard.tolist())}
        place = [(tables[s], r % tables[s].size) for s, r in zip(rows.shard.tolist(), rows.row.tolist(), strict=True)]
        size = feed.spec.image_size
        images = np.empty((len(place), size, size, 3), dtype=np.uint8)
        boxes = mix(feed.order.seed, rows.passes, rows.shard, rows.row, 1 << 20)
        first = np.array([table.caption_offset[r] for table, r in place])
        pool = np.array([table.caption_offset[r + 1] for table, r in place]) - first
        chosen = first[:, None] + draw_captions(feed.order.seed, rows, pool, feed.per_image)
        tokens = np.empty((*chosen.shape, place[0][0].tokens.shape[1]), dtype=np.int64)
        for i, (table, r) in enumerate(place):
            image = table.image(r)
            images[i] = image if feed.crop is None else random_crop(image, size, feed.crop, int(boxes[i]))
            tokens[i] = table.tokens[chosen[i]]
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
        if w <= width and h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    box = (left, top, left + w, top + h)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))
