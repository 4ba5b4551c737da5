"""A node's preloader fetches what the loaders will read: the current stage first, the next one before it begins."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_feed import READER, SPEC, WANTED, numbers, sample, write

from raychain.data.cache import ShardCache
from raychain.data.loader import Feed, Loader
from raychain.data.mixture import Mixture
from raychain.data.order import Order, extend
from raychain.data.pictures import PictureReader
from raychain.data.preload import Item, Preloader, Source, first_windows, wanted
from raychain.data.shards import Shard, survey
from raychain.events import Span

BATCH, SHARDS, SAMPLES, WINDOW = 4, 12, 5, 2
NEXT = dataclasses.replace(SPEC, image_size=20)


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    paths = [
        write(tmp_path / f"{i:02}.tar", [sample(i * SAMPLES + n) for n in range(SAMPLES)]) for i in range(SHARDS + 4)
    ]
    return survey(paths, WANTED, tmp_path / "counts", "data.train")


@pytest.fixture
def sources(shards: list[Shard]) -> list[Source]:
    """Two stages: the second has four shards of its own and another resolution."""

    def source(own: list[Shard], seed: int, spec=SPEC) -> Source:
        order = Order(tuple(s.samples for s in own), seed=seed, window=WINDOW)
        return Source(Feed(tuple(own), order, PictureReader(spec, numbers)), BATCH)

    return [source(shards[:SHARDS], 1), source(shards[SHARDS:], 2, NEXT)]


def until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def resident(cache: ShardCache, source: Source) -> set[int]:
    return {i for i, s in enumerate(source.feed.shards) if cache.path(s, source.feed.reader).exists()}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[Preloader, ShardCache]]]:
    running: list[Preloader] = []

    def make(sources: list[Source], budget: int = 2**30, cpus: float = 1.0) -> tuple[Preloader, ShardCache]:
        cache = ShardCache(tmp_path / "cache", budget)
        running.append(Preloader(sources, cache, cpus))
        return running[-1], cache

    yield make
    for preloader in running:
        preloader.close()


def test_the_current_windows_come_first_then_the_next_stages_then_the_rest(sources: list[Source]) -> None:
    order = sources[0].feed.order
    items = list(wanted(sources, 0, step=3))
    windows = [w.shards for w in extend([], order.lane(0).coming(3 * BATCH), 3 * BATCH + 1, 1)]
    assert len(windows) == 2
    current = list(dict.fromkeys(Item(0, shard) for window in windows for shard in window))
    following = [Item(1, shard) for shard in first_windows(sources[1])]
    assert items[: len(current)] == current
    assert items[len(current) : len(current) + len(following)] == following
    assert sorted(items) == sorted({*(Item(0, s) for s in range(SHARDS)), *following})


def test_the_last_stage_and_a_waiting_loop_have_no_following_stage(sources: list[Source]) -> None:
    assert {item.stage for item in wanted(sources, 1, 0)} == {1}
    assert {item.stage for item in wanted(sources, 0, 0, following=False)} == {0}


def test_several_sources_are_all_preloaded(shards: list[Shard]) -> None:
    parts = (Order((SAMPLES,) * 3, 1, 1), Order((SAMPLES,) * 5, 2, 1))
    feed = Feed(tuple(shards[:8]), Mixture(parts, (1.0, 3.0), 3), READER)
    assert len({shard < 3 for shard in first_windows(Source(feed, BATCH))}) == 2
    assert {item.shard for item in wanted([Source(feed, BATCH)], 0, 0)} == set(range(8))


def test_everything_that_fits_is_there_before_it_is_read(sources, start) -> None:
    preloader, cache = start(sources)
    preloader.report(0, 0, 0.0)
    spans: list[Span] = []
    assert until(lambda: spans.extend(preloader.report(0, 1, 0.0)) or len(spans) == SHARDS + 4)
    assert len(resident(cache, sources[0])) == SHARDS
    assert len(resident(cache, sources[1])) == 4
    assert {span.category for span in spans} == {"preload"}
    assert sorted(span.stage for span in spans) == [0] * SHARDS + [1] * 4
    assert all(span.start <= span.end for span in spans)
    assert preloader.report(0, 1, 0.0) == []


def test_a_small_budget_holds_what_is_read_next_and_is_not_exceeded(sources, start) -> None:
    probe = ShardCache(Path(start(sources)[1].root.parent / "probe"), 2**30)
    probe.table(sources[0].feed.shards[0], READER)
    one = probe.size(sources[0].feed.shards[0], READER)
    preloader, cache = start(sources[:1], budget=int(one * 6.5))
    for step in (0, 5, 9):
        preloader.report(0, step, 0.0)
        soon = [item.shard for item in wanted(sources[:1], 0, step)][:4]
        assert until(lambda soon=soon: set(soon) <= resident(cache, sources[0]))
        assert sum(p.stat().st_size for p in cache.root.rglob("*.arrow")) <= cache.budget


def test_a_loop_that_waits_for_data_stops_work_for_the_next_stage(sources, start) -> None:
    preloader, cache = start(sources)
    preloader.report(0, 0, 0.5)
    assert until(lambda: len(resident(cache, sources[0])) == SHARDS)
    time.sleep(0.7)
    assert not resident(cache, sources[1])
    preloader.report(0, 1, 0.0)
    assert until(lambda: len(resident(cache, sources[1])) == 4)


def test_a_shard_that_cannot_be_read_is_left_to_the_loader_and_the_rest_goes_on(sources, start) -> None:
    broken = Path(sources[0].feed.shards[0].address)
    broken.unlink()
    preloader, cache = start(sources)
    preloader.report(0, 0, 0.0)
    assert until(lambda: len(resident(cache, sources[0])) == SHARDS - 1)
    with (
        Loader(sources[0].feed, cache, global_batch=BATCH, start=0, stop=30) as loader,
        pytest.raises(OSError, match=broken.name),
    ):
        list(loader)


def test_a_loader_after_the_preloader_decodes_nothing(sources, start, monkeypatch: pytest.MonkeyPatch) -> None:
    preloader, cache = start(sources)
    preloader.report(0, 0, 0.0)
    assert until(lambda: len(resident(cache, sources[1])) == 4)
    monkeypatch.setattr(ShardCache, "_make", lambda *_: pytest.fail("decoded again"))
    with Loader(sources[1].feed, cache, global_batch=BATCH, start=0, stop=5) as loader:
        assert len(list(loader)) == 5
