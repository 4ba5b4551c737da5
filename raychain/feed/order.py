"""The order of samples, a pure function of (seed, pass, shard sizes); world size and loader threads do not enter.

A stage reads one endless stream: pass 0 over all shards, then pass 1, … . Every pass holds each sample exactly once.
Global batch `g` is positions g·B … (g+1)·B of that stream, so a batch may span two passes and no sample is ever
dropped at the end of one; the stage ends after a whole number of batches. A rank takes a contiguous block of the
batch, so ranks joined in order are the same batch at any world size.

Within a pass the shards are permuted, taken `window` at a time, and the samples of a window are permuted together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Samples by place: parallel int64 arrays of shard number, row in the shard, and pass."""

    shard: np.ndarray
    row: np.ndarray
    passes: np.ndarray


@dataclass(frozen=True)
class Order:
    """The stream of samples over shards that hold `counts` samples each."""

    counts: tuple[int, ...]
    seed: int
    window: int = 8
    shuffle: bool = True

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

    def coming(self, position: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(end position, shards) of each window from the one that holds `position` on, without end."""
        for pass_ in count(position // self.samples):
            for shards, end in zip(*_plan(self, pass_), strict=True):
                if pass_ * self.samples + end > position:
                    yield pass_ * self.samples + int(end), shards


@lru_cache(maxsize=4)
def _plan(order: Order, pass_: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Shards of each window of a pass, and the window's end within the pass."""
    shards = np.arange(len(order.counts))
    if order.shuffle:
        shards = np.random.default_rng((order.seed, pass_)).permutation(shards)
    windows = [tuple(shards[i : i + order.window].tolist()) for i in range(0, len(shards), order.window)]
    return windows, np.cumsum([sum(order.counts[s] for s in window) for window in windows])


@lru_cache(maxsize=4)
def _window(order: Order, pass_: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    shards = order.windows(pass_)[index]
    shard = np.concatenate([np.full(order.counts[s], s, dtype=np.int64) for s in shards])
    row = np.concatenate([np.arange(order.counts[s], dtype=np.int64) for s in shards])
    if order.shuffle:
        mixed = np.random.default_rng((order.seed, pass_, index + 1)).permutation(len(row))
        shard, row = shard[mixed], row[mixed]
    return shard, row


def rank_slice(size: int, rank: int, world: int) -> slice:
    """The contiguous block of `size` items that `rank` of `world` takes; sizes differ by at most one."""
    return slice(rank * size // world, (rank + 1) * size // world)


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
    """Which captions of each sample are used in its pass: int64 [samples, per_image], indices into the sample's pool.

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
