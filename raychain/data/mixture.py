"""Several sources of different weights: streams merged into one, lane by lane.

Every BLOCK positions of a lane hold as many samples of each source as its share demands, to the nearest whole sample of
the running total, permuted. A source's samples still come once in each of its own passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from heapq import merge

import numpy as np

from raychain.data.order import Order, Pieces, Rows, Window, batch_rows, kept, own_fields

BLOCK = 1024
"""Positions over which a mixture keeps its shares exactly; a power of two times as many where the share of a source
between others is less than a sample of these."""


@dataclass(frozen=True)
class Mixture:
    """Streams merged by weight: in an epoch each sample of `orders[i]` comes `weights[i]` times.

    Shards are numbered through, in the order of the sources; passes count each source's own. All have as many lanes.
    """

    orders: tuple[Order, ...]
    weights: tuple[float, ...]
    seed: int

    def __getstate__(self) -> dict[str, object]:
        return own_fields(self)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Samples of each shard of all sources."""
        return tuple(c for order in self.orders for c in order.counts)

    @cached_property
    def samples(self) -> int:
        """Samples of one epoch."""
        return max(1, round(sum(w * order.samples for w, order in zip(self.weights, self.orders, strict=True))))

    @property
    def lanes(self) -> int:
        """How many lanes it has."""
        return self.orders[0].lanes

    def lane(self, index: int) -> Merged:
        """One of the lanes: the sources' own, merged."""
        return self._lanes[index]

    @cached_property
    def _lanes(self) -> list[Merged]:
        before = np.cumsum([0, *(len(order.counts) for order in self.orders)]).tolist()
        return [
            Merged(
                tuple(order.lane(lane) for order in self.orders),
                self.weights,
                tuple(before[:-1]),
                (self.seed, () if self.lanes == 1 else (lane + 1,)),
            )
            for lane in range(self.lanes)
        ]

    @property
    def block(self) -> int:
        """Positions over which the first lane keeps the shares."""
        return self._lanes[0].block

    def rows(self, start: int, stop: int) -> Rows:
        """The samples of the batch that stream positions start … stop are."""
        return batch_rows(self, start, stop)


class Merged:
    """A lane of several sources. `before` is how many shards precede each source's; `seed` and what follows it in the
    random numbers' key.
    """

    def __init__(
        self,
        lanes: tuple[Pieces, ...],
        weights: tuple[float, ...],
        before: tuple[int, ...],
        seed: tuple[int, tuple[int, ...]],
    ) -> None:
        self._lanes, self._before_shards, self._seed = lanes, before, seed
        self._weighted = [w * lane.samples for w, lane in zip(weights, lanes, strict=True)]
        self._shares = np.cumsum(self._weighted)
        self.sources = len(lanes)
        self.turnover = sum(math.ceil(w / min(weights) * lane.turnover) for w, lane in zip(weights, lanes, strict=True))
        self.samples = max(1, round(sum(self._weighted)))
        self.block = BLOCK
        while min(self._weighted[1:-1], default=self._shares[-1]) * self.block < self._shares[-1]:
            self.block *= 2  # with less than one sample a block the rounded totals might fall
        self._drawn: dict[int, np.ndarray] = {}

    def rows(self, start: int, stop: int) -> Rows:
        """The samples at its positions start … stop."""
        merged = Rows(*(np.zeros(stop - start, dtype=np.int64) for _ in Rows._fields))
        for block in range(start // self.block, -(-stop // self.block)):
            first = max(start, block * self.block)
            source = self._sources(block)[first - block * self.block : stop - block * self.block]
            for index, lane in enumerate(self._lanes):
                places = first - start + np.flatnonzero(source == index)
                begin = self._taken(index, first)
                part = lane.rows(begin, begin + len(places))
                for column, values in zip(merged, part, strict=True):
                    column[places] = values
                merged.shard[places] += self._before_shards[index]
        return merged

    def coming(self, position: int) -> Iterator[Window]:
        """The windows from those that hold `position` on, in the order of their starts, without end."""
        streams = [self._coming(index, position) for index in range(self.sources)]
        return merge(*streams, key=lambda window: window.start)

    def _coming(self, index: int, position: int) -> Iterator[Window]:
        for window in self._lanes[index].coming(self._taken(index, position)):
            # To whole blocks: a little early and a little late.
            start, stop = (self._block(index, place) * self.block for place in (window.start, window.stop))
            offset = self._before_shards[index]
            yield Window(start, stop + self.block, tuple(shard + offset for shard in window.shards))

    def _before(self, block: int) -> np.ndarray:
        """int64 [sources]: samples of each source in all blocks before `block`; together as many as these hold."""
        ends = np.floor(self._shares / self._shares[-1] * (block * self.block) + 0.5).astype(np.int64)
        return np.diff(ends, prepend=0)

    def _sources(self, block: int) -> np.ndarray:
        """int64 [block]: which source each position of the block is of."""
        return kept(self._drawn, block, lambda: self._draw(block), most=8)

    def _draw(self, block: int) -> np.ndarray:
        source = np.repeat(np.arange(self.sources), self._before(block + 1) - self._before(block))
        seed, tail = self._seed
        return np.random.default_rng((seed, block, self.block, *tail)).permutation(source)

    def _taken(self, index: int, position: int) -> int:
        """Samples of source `index` before stream position `position`."""
        block = position // self.block
        inside = self._sources(block)[: position - block * self.block]
        return int(self._before(block)[index]) + int((inside == index).sum())

    def _block(self, index: int, place: int) -> int:
        """The block that holds sample `place` of source `index`'s stream."""
        block = max(0, int(place * sum(self._weighted) / self._weighted[index]) // self.block - 2)
        while self._before(block + 1)[index] <= place:
            block += 1
        return block
