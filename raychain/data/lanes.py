"""Lanes: the samples of a data set shared out once, so that a node needs a fixed part of them alone. Pure arithmetic.

A stream of samples is dealt to its lanes in turns: position t is of the lane whose turn is t modulo their number. In a
batch lanes stand in order, and a rank takes a contiguous block of it, so a rank reads the same few lanes at every step.

Turns go by bit reversal: any 2^k neighbouring positions fall one into each 2^k-th part of the lanes. So where a power
of two of ranks divides the batch, every rank's block begins with the same lane in every batch, also where the number of
lanes does not divide the batch.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

import numpy as np

MOST = 64
"""Lanes that a data set has by itself, at the most."""
SHARDS = 16
"""Shards a lane has by itself, at the least."""


class Part(NamedTuple):
    """Positions start … stop of a lane's own stream."""

    lane: int
    start: int
    stop: int


class Segments(NamedTuple):
    """What a lane consists of: parallel int64 arrays of shard number, first row in the shard, and rows."""

    shard: np.ndarray
    first: np.ndarray
    size: np.ndarray


def usual_lanes(shards: int, samples: int) -> int:
    """Lanes of a data set of which nobody says how many: a power of two, from the data alone.

    `samples` is the size of its smallest source, of which every lane needs one.
    """
    most = min(MOST, shards // SHARDS, samples)
    return 1 << (most.bit_length() - 1) if most > 1 else 1


def cut(counts: np.ndarray, lanes: int, rng: np.random.Generator | None) -> list[Segments]:
    """Shards of these sizes, permuted, one after the other, and cut into lanes of equal size to one sample.

    Without `rng` they stay in their order.
    """
    shards = np.arange(len(counts)) if rng is None else rng.permutation(len(counts))
    shards = shards[counts[shards] > 0]
    ends = np.cumsum(counts[shards])
    starts, total = ends - counts[shards], int(ends[-1])
    found = []
    for lane in range(lanes):
        low, high = lane * total // lanes, (lane + 1) * total // lanes
        part = slice(int(np.searchsorted(ends, low, "right")), int(np.searchsorted(starts, high, "left")))
        first = np.maximum(starts[part], low) - starts[part]
        size = np.minimum(ends[part], high) - starts[part] - first
        found.append(Segments(shards[part], first, size))
    return found


@lru_cache
def _turns(lanes: int) -> np.ndarray:
    """int64 [lanes]: the turn of each lane."""
    bits = max(1, (lanes - 1).bit_length())
    places = np.arange(lanes)
    reverse = sum(((places >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))
    return np.argsort(np.argsort(reverse))


def dealt(lanes: int, position: int) -> np.ndarray:
    """int64 [lanes]: how many of the stream's first `position` samples are of each lane."""
    return (position + lanes - 1 - _turns(lanes)) // lanes


def parts(lanes: int, start: int, stop: int, block: slice | None = None) -> list[Part]:
    """What the samples `block` of the batch of stream positions start … stop are (absent: all), in their order."""
    block = block or slice(0, stop - start)
    if lanes == 1:
        return [Part(0, start + block.start, start + block.stop)] if block.start < block.stop else []
    first, last = dealt(lanes, start), dealt(lanes, stop)
    ends = np.cumsum(last - first)
    low, high = np.maximum(first, last - ends + block.start), np.minimum(last, last - ends + block.stop)
    return [Part(lane, int(low[lane]), int(high[lane])) for lane in np.flatnonzero(low < high).tolist()]


@lru_cache(maxsize=1024)
def needed(lanes: int, batch: int, start: int, stop: int) -> tuple[int, ...]:
    """The lanes that samples start … stop of a batch are of, whichever batch it is."""
    found = set[int]()
    for step in range(lanes // gcd(lanes, batch)):
        found.update(part.lane for part in parts(lanes, step * batch, (step + 1) * batch, slice(start, stop)))
    return tuple(sorted(found))
