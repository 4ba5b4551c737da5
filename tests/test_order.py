"""The order of samples depends on seed, pass, shard sizes and lanes alone: not on world size or where one begins."""

import time
from dataclasses import replace
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raychain.core.dist import rank_slice
from raychain.data.lanes import cut, dealt, needed, parts, usual_lanes
from raychain.data.mixture import BLOCK, Mixture
from raychain.data.order import Order, Rows, draw_captions

counts = st.lists(st.integers(0, 12), min_size=1, max_size=7).filter(any).map(tuple)


@st.composite
def some_orders(draw: st.DrawFn, most: int = 9, lanes: int | None = None) -> Order:
    """Of up to `most` lanes, or of `lanes`."""
    sizes = draw(counts.filter(lambda sizes: sum(sizes) >= (lanes or 1)))
    lanes = lanes or draw(st.integers(1, min(most, sum(sizes))))
    return Order(sizes, draw(st.integers(0, 2**63 - 1)), draw(st.integers(1, 40)), draw(st.booleans()), lanes)


orders = some_orders()


def triples(rows: Rows) -> list[tuple[int, int, int]]:
    """(shard, row, pass) of each sample."""
    return list(zip(*(column.tolist() for column in rows), strict=True))


def everything(order: Order, pass_: int = 0) -> list[tuple[int, int, int]]:
    return [(shard, row, pass_) for shard, size in enumerate(order.counts) for row in range(size)]


@given(orders, st.integers(0, 3))
def test_a_pass_of_all_lanes_holds_each_sample_once(order: Order, pass_: int) -> None:
    found = []
    for lane in map(order.lane, range(order.lanes)):
        assert abs(lane.samples - order.samples / order.lanes) < 1
        found += triples(lane.rows(pass_ * lane.samples, (pass_ + 1) * lane.samples))
    assert sorted(found) == everything(order, pass_)


@given(orders, st.integers(0, 3))
def test_so_many_positions_hold_each_sample_once_where_lanes_are_equal(order: Order, pass_: int) -> None:
    rows = triples(order.rows(pass_ * order.samples, (pass_ + 1) * order.samples))
    if order.samples % order.lanes == 0:
        assert sorted(rows) == everything(order, pass_)
    else:  # a lane with a sample less than another is ahead of it by that sample a pass
        assert len(set(rows) ^ set(everything(order, pass_))) <= 2 * order.lanes * (pass_ + 1)


@given(orders, st.integers(1, 40), st.integers(0, 60))
def test_batches_follow_one_another_wherever_reading_begins(order: Order, batch: int, start: int) -> None:
    steps = [triples(order.rows(g, g + batch)) for g in range(start, start + 3 * batch, batch)]
    assert sorted(chain(*steps)) == sorted(triples(order.rows(start, start + 3 * batch)))
    assert steps == [triples(replace(order).rows(g, g + batch)) for g in range(start, start + 3 * batch, batch)]
    if order.lanes == 1:
        assert triples(order.rows(0, start + 3 * batch))[start:] == list(chain(*steps))


@given(st.integers(1, 70), st.integers(0, 5000), st.integers(1, 300))
def test_a_batch_takes_as_many_of_every_lane(lanes: int, start: int, size: int) -> None:
    found = parts(lanes, start, start + size)
    taken = {part.lane: part.stop - part.start for part in found}
    assert [part.lane for part in found] == sorted(taken)
    assert sum(taken.values()) == size
    each = [taken.get(lane, 0) for lane in range(lanes)]
    assert max(each) - min(each) <= 1
    assert dealt(lanes, start + size).tolist() == (dealt(lanes, start) + each).tolist()


@given(orders, st.integers(1, 30), st.integers(1, 9), st.integers(0, 5))
def test_the_parts_of_the_ranks_joined_are_the_global_batch(order: Order, batch: int, world: int, step: int) -> None:
    start, found = step * batch, []
    for rank in range(world):
        block = rank_slice(batch, rank, world)
        own = parts(order.lanes, start, start + batch, block)
        assert {part.lane for part in own} <= set(needed(order.lanes, batch, block.start, block.stop))
        rows = list(chain(*(triples(order.lane(p.lane).rows(p.start, p.stop)) for p in own)))
        assert len(rows) == block.stop - block.start
        found += rows
    assert found == triples(order.rows(start, start + batch))


@given(st.integers(0, 6), st.integers(0, 6), st.integers(1, 50))
def test_powers_of_two_of_ranks_share_no_lane(lanes_bits: int, world_bits: int, share: int) -> None:
    """Whether the number of lanes divides the batch or not."""
    lanes, world = 2**lanes_bits, 2 ** min(lanes_bits, world_bits)
    batch = world * share
    for rank in range(world):
        block = rank_slice(batch, rank, world)
        own = range(rank * lanes // world, (rank + 1) * lanes // world)
        assert set(needed(lanes, batch, block.start, block.stop)) <= set(own)


@given(counts, st.integers(0, 99), st.integers(1, 20), st.booleans())
def test_lanes_are_cut_at_few_shards(counts: tuple[int, ...], seed: int, lanes: int, shuffle: bool) -> None:
    lanes = min(lanes, sum(counts))
    found = cut(np.array(counts), lanes, np.random.default_rng(seed) if shuffle else None)
    assert sum(len(lane.size) for lane in found) <= sum(map(bool, counts)) + lanes - 1
    assert all((lane.size > 0).all() for lane in found)
    if not shuffle:
        assert [s for lane in found for s in lane.shard.tolist()] == sorted(s for lane in found for s in lane.shard)


@pytest.mark.parametrize(
    ("shards", "lanes"), [(1, 1), (31, 1), (32, 2), (63, 2), (64, 4), (332, 16), (1023, 32), (1024, 64), (10**6, 64)]
)
def test_lanes_follow_from_the_shards(shards: int, lanes: int) -> None:
    assert usual_lanes(shards, 10**9) == lanes
    assert usual_lanes(shards, 3) == min(2, lanes), "a source of three samples"


@given(orders, st.integers(0, 60), st.data())
@settings(max_examples=50)
def test_the_coming_windows_hold_the_samples_up_to_their_ends(order: Order, position: int, data: st.DataObject) -> None:
    lane = order.lane(data.draw(st.integers(0, order.lanes - 1)))
    for start, stop, shards in islice(lane.coming(position), 6):
        assert start <= position < stop
        assert len(shards) <= max(1, order.window // order.lanes)
        rows = lane.rows(position, stop)
        assert set(rows.shard.tolist()) <= set(shards)
        position = stop


@st.composite
def mixtures(draw: st.DrawFn, most: int = 4) -> Mixture:
    lanes = draw(st.integers(1, most))
    parts = tuple(draw(st.lists(some_orders(lanes=lanes), min_size=1, max_size=3)))
    weights = tuple(draw(st.sampled_from([0.002, 0.5, 1.0, 2.0, 3.7])) for _ in parts)
    return Mixture(parts, weights, draw(st.integers(0, 2**32)))


@given(mixtures(1), st.integers(0, 5000), st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_a_mixture_read_from_the_middle_is_the_same_stream(mixture: Mixture, start: int, size: int) -> None:
    stream = triples(mixture.rows(0, start + size))
    assert triples(mixture.rows(start, start + size)) == stream[start:]


@given(mixtures(), st.integers(1, 200), st.integers(0, 40), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_mixtures_batches_are_the_same_on_any_number_of_ranks(
    mixture: Mixture, batch: int, step: int, world: int
) -> None:
    start, found = step * batch, []
    for rank in range(world):
        for part in parts(mixture.lanes, start, start + batch, rank_slice(batch, rank, world)):
            found += triples(mixture.lane(part.lane).rows(part.start, part.stop))
    assert found == triples(replace(mixture).rows(start, start + batch))


@given(mixtures(), st.integers(BLOCK, 8 * BLOCK), st.data())
@settings(max_examples=60, deadline=None)
def test_a_mixture_keeps_its_shares_and_each_source_its_own_order(
    mixture: Mixture, size: int, data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, mixture.lanes - 1))
    lane, sources = mixture.lane(index), [order.lane(index) for order in mixture.orders]
    stream = triples(lane.rows(0, size))
    total = sum(w * source.samples for w, source in zip(mixture.weights, sources, strict=True))
    offset = 0
    for weight, order, source in zip(mixture.weights, mixture.orders, sources, strict=True):
        own = [(s - offset, r, p) for s, r, p in stream if offset <= s < offset + len(order.counts)]
        assert own == triples(source.rows(0, len(own)))
        assert abs(len(own) - size * weight * source.samples / total) <= lane.block / 2
        whole = [s for s, _, _ in stream[: size // lane.block * lane.block] if offset <= s < offset + len(order.counts)]
        assert abs(len(whole) - size // lane.block * lane.block * weight * source.samples / total) <= 1
        offset += len(order.counts)


@given(mixtures(), st.integers(0, 3000), st.data())
@settings(max_examples=40, deadline=None)
def test_the_coming_windows_of_a_mixture_hold_its_samples(mixture: Mixture, position: int, data: st.DataObject) -> None:
    lane = mixture.lane(data.draw(st.integers(0, mixture.lanes - 1)))
    size = 700
    windows = []
    for window in lane.coming(position):
        if window.start >= position + size and len(windows) > 20:
            break
        windows.append(window)
    assert [w.start for w in windows] == sorted(w.start for w in windows)
    for place in range(position, position + size, 50):
        held = {s for w in windows if w.start <= place < w.stop for s in w.shards}
        assert set(lane.rows(place, place + 1).shard.tolist()) <= held


@pytest.mark.parametrize("small", [300, 5000])
def test_a_source_between_others_may_be_tiny(small: int) -> None:
    """Less than one sample in BLOCK positions ended a run with an error once the rounded totals fell."""
    orders = (Order((100_000,) * 7, 0), Order((small,), 1), Order((100_000,) * 10, 2))
    mixture = Mixture(orders, (1.3, 1.0, 1.0), 0)
    assert (mixture.block == BLOCK) == (small == 5000)
    shards = mixture.rows(0, mixture.samples).shard
    assert abs((shards == 7).sum() - small) <= 2


def test_a_large_set_is_planned_at_once_and_a_node_touches_its_part() -> None:
    """experiments/benchmarks/order.py at a twentieth of the shards; the bounds hold where other work disturbs."""
    shards, samples, batch, world = 5_000, 2_000, 8_192, 64
    started = time.thread_time()
    order = Order((samples,) * shards, 0, lanes=usual_lanes(shards, shards * samples))
    assert order.lane(0).samples == shards * samples // 64
    assert time.thread_time() - started < 2
    for rank in (0, 37):
        block, took, touched = rank_slice(batch, rank, world), [], set[int]()
        for step in range(shards * samples // batch):
            started = time.thread_time()
            own = parts(order.lanes, step * batch, (step + 1) * batch, block)
            rows = [order.lane(part.lane).rows(part.start, part.stop) for part in own]
            took.append(time.thread_time() - started)
            touched |= {shard for part in rows for shard in part.shard.tolist()}
        assert sorted(took)[len(took) // 2] < 2e-3
        assert len(touched) <= shards / 64 + 2


def test_seeds_and_passes_give_different_orders() -> None:
    def stream(seed: int, pass_: int) -> list[tuple[int, int, int]]:
        return [t[:2] for t in triples(Order((50, 50, 50), seed, window=2).rows(pass_ * 150, pass_ * 150 + 150))]

    assert stream(0, 0) == stream(0, 0)
    assert len({tuple(stream(seed, pass_)) for seed in range(4) for pass_ in range(4)}) == 16


def test_without_shuffling_the_order_is_that_of_the_files() -> None:
    assert triples(Order((2, 0, 1), seed=3, shuffle=False).rows(0, 4)) == [(0, 0, 0), (0, 1, 0), (2, 0, 0), (0, 0, 1)]


def test_samples_mix_within_a_window_and_not_beyond_it() -> None:
    order = Order((20,) * 6, seed=1, window=2)
    for index, shards in enumerate(order.lane(0).windows(0)):
        rows = order.rows(index * 40, index * 40 + 40)
        assert set(rows.shard.tolist()) == set(shards)
        assert len(set(rows.shard[:20].tolist())) == 2


def test_an_empty_stretch_has_no_samples() -> None:
    assert triples(Order((3,), 0).rows(2, 2)) == []


def rows_of(samples: int, passes: int = 0) -> Rows:
    """`samples` rows of one shard."""
    return Rows(np.zeros(samples, np.int64), np.arange(samples), np.full(samples, passes))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 9), st.integers(0, 2**63 - 1))
def test_captions_are_drawn_without_replacement_and_with_the_raw_one(pool: list[int], k: int, seed: int) -> None:
    sizes = np.array(pool)
    drawn = draw_captions(seed, rows_of(len(pool)), sizes, k)
    assert drawn.shape == (len(pool), k)
    assert (drawn >= 0).all()
    assert (drawn < sizes[:, None]).all()
    for row, size in zip(drawn.tolist(), pool, strict=True):
        assert len(set(row)) == min(k, size)
        if k > 1:
            assert 0 in row
    np.testing.assert_array_equal(drawn, draw_captions(seed, rows_of(len(pool)), sizes, k))


@given(st.integers(2, 40), st.integers(1, 5), st.data())
def test_a_samples_captions_do_not_depend_on_its_batch(samples: int, k: int, data: st.DataObject) -> None:
    pool = np.array(data.draw(st.lists(st.integers(1, 9), min_size=samples, max_size=samples)))
    cut = data.draw(st.integers(1, samples - 1))
    rows = rows_of(samples, passes=2)
    joined = [
        draw_captions(5, Rows(*(column[part] for column in rows)), pool[part], k)
        for part in (slice(0, cut), slice(cut, samples))
    ]
    np.testing.assert_array_equal(np.concatenate(joined), draw_captions(5, rows, pool, k))


@pytest.mark.parametrize("k", [1, 2, 7])
def test_every_caption_is_reached_about_equally_often(k: int) -> None:
    samples, size = 3000, 10
    drawn = draw_captions(0, rows_of(samples), np.full(samples, size), k)
    share = np.bincount(drawn.ravel(), minlength=size) / samples
    first, rest = (k / size, k / size) if k == 1 else (1.0, (k - 1) / (size - 1))
    assert share[0] == pytest.approx(first, abs=0.04)
    assert share[1:] == pytest.approx(np.full(size - 1, rest), abs=0.04)


def test_captions_change_with_the_pass_the_seed_and_the_shard() -> None:
    rows, pool = rows_of(50), np.full(50, 8)
    variants = [
        draw_captions(0, rows, pool, 3),
        draw_captions(1, rows, pool, 3),
        draw_captions(0, rows._replace(passes=rows.passes + 1), pool, 3),
        draw_captions(0, rows._replace(shard=rows.shard + 1), pool, 3),
    ]
    assert len({variant.tobytes() for variant in variants}) == 4
