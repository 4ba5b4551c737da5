"""The order of samples, a pure function of (seed, pass, shard sizes); world size and loader threads do not enter.

A stage reads one endless stream: pass 0 over all shards, then pass 1, … . Every pass holds each sample exactly once.
Global batch `g` is positions g·B … (g+1)·B of that stream, so a batch may span two passes and no sample is ever
dropped at the end of one; the stage ends after a whole number of batches. A rank takes a contiguous block of the
batch, so ranks joined in order are the same batch at any world size.

Within a pass the shards are permuted, taken `window` at a time, and the samples of a window are permuted together.

Several sources of different weights (`Mixture`) are such streams merged into one: every BLOCK positions hold as many
of each source as its share demands, to the nearest whole sample of the running total, permuted. A source's samples
still come once in each of its own passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from heapq import merge
from itertools import count
from typing import NamedTuple, Protocol

import numpy as np


class Rows(NamedTuple):
    """Samples by place: parallel int64 arrays of shard number, row in the shard, and pass."""

    shard: np.ndarray
    row: np.ndarray
    passes: np.ndarray


class Window(NamedTuple):
    """Stream positions start … stop lie in these shards; with several sources other windows' positions among them."""

    start: int
    stop: int
    shards: tuple[int, ...]


def extend(ahead: list[Window], coming: Iterator[Window], stop: int, sources: int) -> list[Window]:
    """`ahead` with what comes: every window that begins before `stop`, and of each source one more (on average).

    That is what a loader holds to read up to `stop`. Returns the windows added.
    """
    known = len(ahead)
    while sum(window.start >= stop for window in ahead) < sources:
        ahead.append(next(coming))
    return ahead[known:]


class Stream(Protocol):
    """An endless, random-access stream of samples."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples of each shard."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the order, and of what is drawn for each sample."""
        ...

    @property
    def samples(self) -> int:
        """Samples of one epoch."""
        ...

    @property
    def sources(self) -> int:
        """How many windows are read from at the same time."""
        ...

    def rows(self, start: int, stop: int) -> Rows:
        """The samples at stream positions start … stop."""
        ...

    def coming(self, position: int) -> Iterator[Window]:
        """The windows from those that hold `position` on, in the order of their starts, without end."""
        ...


@dataclass(frozen=True)
class Order:
    """The stream of samples over shards that hold `counts` samples each."""

    counts: tuple[int, ...]
    seed: int
    window: int = 8
    shuffle: bool = True
    sources = 1

    @cached_property
    def samples(self) -> int:
        """Samples of one pass."""
        return sum(self.counts)

    def windows(self, pass_: int) -> list[tuple[int, ...]]:
        """Shard numbers of each window of a pass, in reading order."""
        return _plan(self, pass_)[0]

    def rows(self, start: int, stop: int) -> Rows:
        """The samples at stream positions start … stop."""
        none = np.zeros(0, dtype=np.int64)
        parts = [Rows(none, none, none)]
        while start < stop:
            pass_, offset = divmod(start, self.samples)
            ends = _plan(self, pass_)[1]
            index = int(np.searchsorted(ends, offset, side="right"))
            shard, row = _window(self, pass_, index)
            first = offset - (int(ends[index]) - len(row))
            part = slice(first, first + stop - start)
            parts.append(Rows(shard[part], row[part], np.full(len(row[part]), pass_)))
            start += len(row[part])
        return Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def coming(self, position: int) -> Iterator[Window]:
        """The windows from the one that holds `position` on, without end."""
        for pass_ in count(position // self.samples):
            start = pass_ * self.samples
            for shards, end in zip(*_plan(self, pass_), strict=True):
                stop = pass_ * self.samples + int(end)
                if stop > max(position, start):
                    yield Window(start, stop, shards)
                start = stop


BLOCK = 1024
"""Positions over which a mixture keeps its shares exactly."""


@dataclass(frozen=True)
class Mixture:
    """Streams merged by weight: in an epoch each sample of `orders[i]` comes `weights[i]` times.

    Shards are numbered through, in the order of the sources; passes count each source's own.
    """

    orders: tuple[Order, ...]
    weights: tuple[float, ...]
    seed: int

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Samples of each shard of all sources."""
        return tuple(c for order in self.orders for c in order.counts)

    @cached_property
    def samples(self) -> int:
        """Samples of one epoch."""
        return max(1, round(sum(w * order.samples for w, order in zip(self.weights, self.orders, strict=True))))

    @property
    def sources(self) -> int:
        """How many windows are read from at the same time."""
        return len(self.orders)

    def rows(self, start: int, stop: int) -> Rows:
        """The samples at stream positions start … stop."""
        merged = Rows(*(np.zeros(stop - start, dtype=np.int64) for _ in Rows._fields))
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            first = max(start, block * BLOCK)
            source = _sources(self, block)[first - block * BLOCK : stop - block * BLOCK]
            for index, order in enumerate(self.orders):
                places = first - start + np.flatnonzero(source == index)
                begin = self._taken(index, first)
                part = order.rows(begin, begin + len(places))
                for column, values in zip(merged, part, strict=True):
                    column[places] = values
                merged.shard[places] += self._offset(index)
        return merged

    def coming(self, position: int) -> Iterator[Window]:
        """The windows from those that hold `position` on, in the order of their starts, without end."""
        streams = [self._coming(index, position) for index in range(self.sources)]
        return merge(*streams, key=lambda window: window.start)

    def _coming(self, index: int, position: int) -> Iterator[Window]:
        for window in self.orders[index].coming(self._taken(index, position)):
            # To whole blocks: a little early and a little late.
            start, stop = (self._block(index, place) * BLOCK for place in (window.start, window.stop))
            offset = self._offset(index)
            yield Window(start, stop + BLOCK, tuple(shard + offset for shard in window.shards))

    def _offset(self, index: int) -> int:
        return sum(len(order.counts) for order in self.orders[:index])

    def _before(self, block: int) -> np.ndarray:
        """int64 [sources]: samples of each source in all blocks before `block`; their sum is block × BLOCK."""
        shares = np.cumsum([w * order.samples for w, order in zip(self.weights, self.orders, strict=True)])
        ends = np.floor(shares / shares[-1] * (block * BLOCK) + 0.5).astype(np.int64)
        return np.diff(ends, prepend=0)

    def _taken(self, index: int, position: int) -> int:
        """Samples of source `index` before stream position `position`."""
        block = position // BLOCK
        inside = _sources(self, block)[: position - block * BLOCK]
        return int(self._before(block)[index]) + int((inside == index).sum())

    def _block(self, index: int, place: int) -> int:
        """The block that holds sample `place` of source `index`'s stream."""
        weight = self.weights[index] * self.orders[index].samples
        total = sum(w * order.samples for w, order in zip(self.weights, self.orders, strict=True))
        block = max(0, int(place * total / weight) // BLOCK - 2)
        while self._before(block + 1)[index] <= place:
            block += 1
        return block


@lru_cache(maxsize=16)
def _plan(order: Order, pass_: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Shards of each window of a pass, and the window's end within the pass."""
    shards = np.arange(len(order.counts))
    if order.shuffle:
        shards = np.random.default_rng((order.seed, pass_)).permutation(shards)
    windows = [tuple(shards[i : i + order.window].tolist()) for i in range(0, len(shards), order.window)]
    return windows, np.cumsum([sum(order.counts[s] for s in window) for window in windows])


@lru_cache(maxsize=64)
def _sources(mixture: Mixture, block: int) -> np.ndarray:
    """int64 [BLOCK]: which source each position of the block is of."""
    counts = mixture._before(block + 1) - mixture._before(block)
    source = np.repeat(np.arange(mixture.sources), counts)
    return np.random.default_rng((mixture.seed, block, BLOCK)).permutation(source)


@lru_cache(maxsize=16)
def _window(order: Order, pass_: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    shards = order.windows(pass_)[index]
    shard = np.concatenate([np.full(order.counts[s], s, dtype=np.int64) for s in shards])
    row = np.concatenate([np.arange(order.counts[s], dtype=np.int64) for s in shards])
    if order.shuffle:
        mixed = np.random.default_rng((order.seed, pass_, index + 1)).permutation(len(row))
        shard, row = shard[mixed], row[mixed]
    return shard, row


def mix(*values: np.ndarray | int) -> np.ndarray:
    """A uint64 hash of integers (broadcast together) in which every bit depends on every input: splitmix64, chained."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            state = state + np.asarray(value).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def draw_captions(seed: int, rows: Rows, pool: np.ndarray, per_image: int) -> np.ndarray:
    """The captions of each sample that its pass uses: int64 [samples, per_image], indices into the sample's pool.

    `pool` [samples] holds how many captions each sample has, at least one. Drawn without replacement, anew for every
    (seed, pass, sample); a pool smaller than `per_image` repeats. With per_image > 1 caption 0, the raw one, is always
    among them.
    """
    slots = int(pool.max(initial=1))
    columns = np.arange(slots)
    score = mix(seed, rows.passes[:, None], rows.shard[:, None], rows.row[:, None], columns[None, :])
    score = (score >> np.uint64(1)).astype(np.int64)
    if per_image > 1:
        score[:, 0] = -1
    score[columns[None, :] >= pool[:, None]] = np.iinfo(np.int64).max
    ranked = np.argsort(score, axis=1, kind="stable")
    wanted = np.arange(per_image)[None, :] % pool[:, None]
    return np.take_along_axis(ranked, wanted, axis=1)
