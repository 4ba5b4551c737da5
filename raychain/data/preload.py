"""Decoding shards into a node's cache ahead of the loaders: the current stage's first, then the next stage's.

Only the lanes that the node's ranks read are prepared: for the next stage those that they are going to read.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from heapq import merge
from itertools import chain, islice
from typing import NamedTuple

from raychain.data.cache import ShardCache
from raychain.data.lanes import dealt
from raychain.data.loader import Feed, lanes_of, shards_of
from raychain.data.order import Window, extend
from raychain.events import Span

log = logging.getLogger("raychain.data")

SHARE_OF_BUDGET = 0.8
"""The part of the cache that may be filled ahead; the rest is for what loaders and evaluation fetch themselves."""
IDLE_S = 0.5
"""How often a preloader without work looks for some."""
WAITING = 0.02
"""Share of its time that the training loop waits for data from which on only the current stage is preloaded."""


class Source(NamedTuple):
    """What a stage reads, so many samples a step."""

    feed: Feed
    global_batch: int


class Item(NamedTuple):
    """A shard of a stage's feed."""

    stage: int
    shard: int


class Ranks(NamedTuple):
    """Some ranks of a worker group."""

    ranks: Sequence[int]
    world: int


ALONE = Ranks((0,), 1)
"""A group of one."""


def wanted(
    sources: Sequence[Source], stage: int, step: int, node: Ranks = ALONE, *, following: bool = True
) -> Iterator[Item]:
    """What should be in the cache of the node of these ranks at `step` of `stage`, the most urgent first, each once.

    The windows the current stage's loaders read and the next ones, then (with `following`) the first windows of the
    next stage, then what the current stage reads until it has seen every shard again.
    """
    windows, rest = _held(sources[stage], step, node)
    soon = [Item(stage, shard) for shard in shards_of(sources[stage].feed.order, windows)]
    if following and stage + 1 < len(sources):
        soon += [Item(stage + 1, shard) for shard in first_windows(sources[stage + 1], node)]
    later = (Item(stage, shard) for window in rest for shard in shards_of(sources[stage].feed.order, [window]))
    seen: set[Item] = set()
    for item in chain(soon, later):
        if item not in seen:
            seen.add(item)
            yield item


def first_windows(source: Source, node: Ranks = ALONE) -> list[int]:
    """The shards that the ranks' loaders hold before their first batch."""
    return shards_of(source.feed.order, _held(source, 0, node)[0])


def _held(source: Source, step: int, node: Ranks) -> tuple[list[Window], Iterator[Window]]:
    """The windows that the ranks' loaders hold at a step, those in use first; and what comes after these, of all lanes,
    until each was read."""
    order, now, soon, rest, turnover = source.feed.order, [], [], [], 0
    places = dealt(order.lanes, step * source.global_batch).tolist()
    for index in lanes_of(order, source.global_batch, *node, source.feed.together):
        lane = order.lane(index)
        coming, place = lane.coming(places[index]), places[index]
        windows = extend([], coming, place + 1, lane.sources)
        now += [window for window in windows if window.start <= place]
        soon += [window for window in windows if window.start > place]
        rest.append(coming)
        turnover += lane.turnover
    return now + soon, islice(merge(*rest, key=lambda window: window.start), 2 * turnover)


class Preloader:
    """Threads that keep the node's cache filled with what `report` says will be needed.

    They use at most about `cpus` cores (a fraction: one thread that rests in between), and leave the next stage alone
    while the training loop waits for data.
    """

    def __init__(self, sources: Sequence[Source], cache: ShardCache, cpus: float, node: Ranks = ALONE) -> None:
        self.sources, self.cache, self._node = sources, cache, node
        self._threads = max(1, math.floor(cpus))
        self._rest = max(0.0, self._threads / cpus - 1)
        """Seconds of rest for each second of work."""
        self._place: tuple[int, int, float] | None = None
        self._spans: list[Span] = []
        self._failed: set[Item] = set()
        self._looked = 0.0
        """When what is wanted was last marked as used: what was used since does not make room for more."""
        self._news = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="preloader", daemon=True)
        self._thread.start()

    def report(self, stage: int, step: int, waiting: float) -> list[Span]:
        """Where the training loop is, and the share of its time it waited for data; returns the spans since the last
        call.
        """
        self._place = (stage, step, waiting)
        self._news.set()
        spans, self._spans = self._spans, []
        return spans

    def close(self) -> None:
        """Stops after the shards under way."""
        self._closed.set()
        self._news.set()
        self._thread.join()

    def _work(self) -> None:
        running: dict[Future[None], Item] = {}
        with ThreadPoolExecutor(self._threads, thread_name_prefix="preload") as pool:
            while not self._closed.is_set():
                missing = [item for item in self._missing() if item not in running.values()]
                for item in missing[: self._threads - len(running)]:
                    running[pool.submit(self._make, item)] = item
                if running:
                    wait(running, timeout=IDLE_S, return_when="FIRST_COMPLETED")
                    running = {job: item for job, item in running.items() if not job.done()}
                else:
                    self._news.wait(IDLE_S)
                    self._news.clear()

    def _missing(self) -> list[Item]:
        """What is wanted, fits beside what is wanted more, and is not in the cache."""
        if self._place is None:
            return []
        stage, step, waiting = self._place
        room, self._looked = self.cache.budget * SHARE_OF_BUDGET, time.time()
        missing: list[Item] = []
        for item in wanted(self.sources, stage, step, self._node, following=waiting < WAITING):
            source = self.sources[item.stage]
            shard, reader = source.feed.shards[item.shard], source.feed.reader
            room -= self.cache.size(shard, reader)
            if room < 0 or len(missing) > self._threads:
                break
            if not self.cache.touch(shard, reader) and item not in self._failed:
                missing.append(item)
        return missing

    def _make(self, item: Item) -> None:
        source = self.sources[item.stage]
        shard, started = source.feed.shards[item.shard], time.time()
        try:
            written = self.cache.ensure(shard, source.feed.reader, spare=self._looked)
        except OSError as error:  # the loader that needs it will say so, if it still cannot be read then
            log.debug("not preloaded: %s", error)
            self._failed.add(item)
            return
        if not written:  # another was quicker, or loaders hold the room
            self._closed.wait(IDLE_S)
            return
        name = shard.address.rpartition("/")[2]
        self._spans.append(Span(f"preload {name}", "preload", started, time.time(), item.stage))
        self._closed.wait((time.time() - started) * self._rest)
