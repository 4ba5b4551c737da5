"""The order of samples, a pure function of (seed, pass, shard sizes); world size and loader threads do not enter.

A stage reads one endless stream: pass 0 over all shards, then pass 1, … . Every pass holds each sample exactly once.
Global batch `g` is positions g·B … (g+1)·B of that stream, so a batch may span two passes and no sample is ever
dropped at the end of one; the stage ends after a whole number of batches. A rank takes a contiguous block of the
batch, so ranks joined in order are the same batch at any world size.

With one lane the shards are permuted in a pass, taken `window` at a time, and the samples of a window are permuted
together. With several (`raychain.data.lanes`) the shards are laid out and cut into lanes once. Each lane is such a
stream, which permutes its own pieces of shards and has passes of its own; a batch takes as many samples of each as of
the others, to one, and the lanes' windows hold `window` shards together, at least one each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from raychain.data.lanes import Segments, cut, parts

K = TypeVar("K")
T = TypeVar("T")


class Rows(NamedTuple):
    """Samples by place: parallel int64 arrays of shard number, row in the shard, and pass."""

    shard: np.ndarray
    row: np.ndarray
    passes: np.ndarray


def joined(rows: list[Rows]) -> Rows:
    """One after the other."""
    if len(rows) == 1:
        return rows[0]
    none = np.zeros(0, dtype=np.int64)
    return Rows(*(np.concatenate(column) for column in zip(Rows(none, none, none), *rows, strict=True)))


class Window(NamedTuple):
    """A lane's positions start … stop lie in these shards; with several sources other windows' positions among them."""

    start: int
    stop: int
    shards: tuple[int, ...]


def extend(ahead: list[Window], coming: Iterator[Window], stop: int, sources: int, *, shards: int = 0) -> list[Window]:
    """`ahead` with what comes: every window that begins before `stop`, and of each source one more (on average).

    That is what a loader holds to read up to `stop`. The windows that follow it have so many `shards` at the least.
    Returns the windows added.
    """
    known, following = len(ahead), [window for window in ahead if window.start >= stop]
    while len(following) < sources or sum(len(window.shards) for window in following) < shards:
        ahead.append(next(coming))
        if ahead[-1].start >= stop:
            following.append(ahead[-1])
    return ahead[known:]


class Lane(Protocol):
    """An endless, random-access stream of some of the samples, all of them where there is one lane."""

    @property
    def samples(self) -> int:
        """Samples of one epoch."""
        ...

    @property
    def turnover(self) -> int:
        """Windows in which it reads all that it has, beginning with a pass."""
        ...

    @property
    def sources(self) -> int:
        """How many windows are read from at the same time."""
        ...

    def rows(self, start: int, stop: int) -> Rows:
        """The samples at its positions start … stop."""
        ...

    def coming(self, position: int) -> Iterator[Window]:
        """The windows from those that hold `position` on, in the order of their starts, without end."""
        ...


class Stream(Protocol):
    """An endless, random-access stream of samples, in lanes."""

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
    def lanes(self) -> int:
        """How many lanes it has."""
        ...

    def lane(self, index: int) -> Lane:
        """One of them."""
        ...

    def rows(self, start: int, stop: int) -> Rows:
        """The samples of the batch that stream positions start … stop are."""
        ...


def batch_rows(stream: Stream, start: int, stop: int) -> Rows:
    """See Stream.rows."""
    return joined([stream.lane(part.lane).rows(part.start, part.stop) for part in parts(stream.lanes, start, stop)])


@dataclass(frozen=True)
class Order:
    """The stream of samples over shards that hold `counts` samples each."""

    counts: tuple[int, ...]
    seed: int
    window: int = 8
    shuffle: bool = True
    lanes: int = 1

    def __getstate__(self) -> dict[str, object]:
        return own_fields(self)

    @cached_property
    def samples(self) -> int:
        """Samples of one pass."""
        return sum(self.counts)

    def lane(self, index: int) -> Pieces:
        """One of the lanes."""
        return self._lanes[index]

    @cached_property
    def _lanes(self) -> list[Pieces]:
        counts = np.array(self.counts, dtype=np.int64)
        if self.lanes == 1:
            whole = Segments(np.arange(len(counts)), np.zeros_like(counts), counts)
            return [Pieces(whole, self.seed, (), self.window, self.shuffle)]
        if self.lanes > self.samples:
            raise ValueError(f"{self.lanes} lanes of {self.samples} samples")
        layout = np.random.default_rng((self.seed, 0, 0, 0, 1)) if self.shuffle else None
        window = max(1, self.window // self.lanes)
        segments = enumerate(cut(counts, self.lanes, layout))
        return [Pieces(own, self.seed, (lane + 1,), window, self.shuffle) for lane, own in segments]

    def rows(self, start: int, stop: int) -> Rows:
        """The samples of the batch that stream positions start … stop are."""
        return batch_rows(self, start, stop)


class Pieces:
    """A lane of one source: pieces of shards, permuted in every pass, `window` of them mixed at a time.

    `tail` sets the lane's random numbers apart from those of others.
    """

    sources = 1

    def __init__(self, segments: Segments, seed: int, tail: tuple[int, ...], window: int, shuffle: bool) -> None:
        self._segments, self._seed, self._tail = segments, seed, tail
        self._window, self._shuffle = window, shuffle
        self._count, self.samples = len(segments.size), int(segments.size.sum())
        self.turnover = -(-self._count // window)
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._mixed: dict[tuple[int, int], np.ndarray] = {}

    def windows(self, pass_: int) -> list[tuple[int, ...]]:
        """Shard numbers of each window of a pass, in reading order."""
        shards = self._segments.shard[self._plan(pass_)[0]]
        return [tuple(shards[i : i + self._window].tolist()) for i in range(0, self._count, self._window)]

    def rows(self, start: int, stop: int) -> Rows:
        """The samples at its positions start … stop."""
        found: list[Rows] = []
        while start < stop:
            pass_, offset = divmod(start, self.samples)
            order, ends = self._plan(pass_)
            index = int(ends.searchsorted(offset, side="right"))
            first = offset - (int(ends[index - 1]) if index else 0)
            mixed = self._places(pass_, index)[first : first + stop - start]
            pieces = order[index * self._window : (index + 1) * self._window]
            edges = self._segments.size[pieces].cumsum()
            which = edges.searchsorted(mixed, side="right")
            piece = pieces[which]
            row = mixed + (self._segments.first[piece] - (edges - self._segments.size[pieces])[which])
            found.append(Rows(self._segments.shard[piece], row, np.full(len(mixed), pass_)))
            start += len(mixed)
        return joined(found)

    def coming(self, position: int) -> Iterator[Window]:
        """The windows from the one that holds `position` on, without end."""
        for pass_ in count(position // self.samples):
            (order, ends), begin = self._plan(pass_), pass_ * self.samples
            first = int(ends.searchsorted(position - begin, side="right"))
            start = begin + (int(ends[first - 1]) if first else 0)
            for index, end in enumerate(ends[first:].tolist(), first):
                if begin + end > start:
                    shards = self._segments.shard[order[index * self._window : (index + 1) * self._window]]
                    yield Window(start, begin + end, tuple(shards.tolist()))
                start = begin + end

    def _plan(self, pass_: int) -> tuple[np.ndarray, np.ndarray]:
        """A pass's pieces in order, and the windows' ends within the pass."""
        return kept(self._plans, pass_, lambda: self._planned(pass_))

    def _planned(self, pass_: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.arange(self._count)
        if self._shuffle:
            order = self._rng(pass_, 0).permutation(order)
        sizes = self._segments.size[order]
        return order, np.add.reduceat(sizes, np.arange(0, self._count, self._window)).cumsum()

    def _places(self, pass_: int, index: int) -> np.ndarray:
        """The samples of a window in the order in which they come: each its place in the window's joined pieces."""
        return kept(self._mixed, (pass_, index), lambda: self._placed(pass_, index))

    def _placed(self, pass_: int, index: int) -> np.ndarray:
        ends = self._plan(pass_)[1]
        size = int(ends[index]) - (int(ends[index - 1]) if index else 0)
        order = self._rng(pass_, index + 1).permutation(size) if self._shuffle else np.arange(size)
        return order.astype(np.int32 if size < 2**31 else np.int64)

    def _rng(self, pass_: int, kind: int) -> np.random.Generator:
        """Random numbers of the order of a pass's pieces (`kind` 0) or of its window `kind` - 1."""
        return np.random.default_rng((self._seed, pass_, kind, *self._tail))


def own_fields(order: Any) -> dict[str, object]:
    """What travels to other processes: not what was worked out from it."""
    return {field.name: getattr(order, field.name) for field in fields(order)}


def kept(known: dict[K, T], key: K, make: Callable[[], T], most: int = 2) -> T:
    """`known[key]`, made where it is missing; of `known` the last few are kept."""
    if (value := known.get(key)) is None:
        value = make()
        for old in list(known)[: max(0, len(known) - most + 1)]:
            known.pop(old, None)
        known[key] = value
    return value


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
