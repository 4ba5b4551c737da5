"""The order of samples depends on seed, pass and shard sizes alone: not on world size, not on where reading starts."""

from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raychain.core.dist import rank_slice
from raychain.data.order import BLOCK, Mixture, Order, Rows, draw_captions

counts = st.lists(st.integers(0, 12), min_size=1, max_size=7).filter(any).map(tuple)
orders = st.builds(Order, counts, seed=st.integers(0, 2**63 - 1), window=st.integers(1, 4), shuffle=st.booleans())


def triples(rows: Rows) -> list[tuple[int, int, int]]:
    """(shard, row, pass) of each sample."""
    return list(zip(*(column.tolist() for column in rows), strict=True))


@given(orders, st.integers(0, 3))
def test_a_pass_holds_each_sample_once(order: Order, pass_: int) -> None:
    rows = order.rows(pass_ * order.samples, (pass_ + 1) * order.samples)
    wanted = [(shard, row, pass_) for shard, size in enumerate(order.counts) for row in range(size)]
    assert sorted(triples(rows)) == wanted


@given(orders, st.integers(1, 40), st.integers(0, 60))
def test_reading_from_the_middle_is_skipping(order: Order, batch: int, start: int) -> None:
    stream = triples(order.rows(0, start + 3 * batch))
    assert triples(order.rows(start, start + 3 * batch)) == stream[start:]
    steps = [triples(order.rows(g, g + batch)) for g in range(start, start + 3 * batch, batch)]
    assert list(chain.from_iterable(steps)) == stream[start:]


@given(orders, st.integers(1, 30), st.integers(1, 9))
def test_rank_slices_joined_are_the_global_batch(order: Order, batch: int, world: int) -> None:
    rows = order.rows(batch, 2 * batch)
    parts = [triples(Rows(*(column[rank_slice(batch, rank, world)] for column in rows))) for rank in range(world)]
    assert list(chain.from_iterable(parts)) == triples(rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(orders, st.integers(0, 60))
@settings(max_examples=50)
def test_the_coming_windows_hold_the_samples_up_to_their_ends(order: Order, position: int) -> None:
    for start, stop, shards in islice(order.coming(position), 6):
        assert start <= position <= stop  # equal for a window of empty shards
        rows = order.rows(position, stop)
        assert set(rows.shard.tolist()) <= set(shards)
        position = stop


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    parts = tuple(draw(st.lists(orders, min_size=1, max_size=3)))
    weights = tuple(draw(st.sampled_from([0.5, 1.0, 2.0, 3.7])) for _ in parts)
    return Mixture(parts, weights, draw(st.integers(0, 2**32)))


@given(mixtures(), st.integers(0, 5000), st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_a_mixture_read_from_the_middle_is_the_same_stream(mixture: Mixture, start: int, size: int) -> None:
    stream = triples(mixture.rows(0, start + size))
    assert triples(mixture.rows(start, start + size)) == stream[start:]


@given(mixtures(), st.integers(BLOCK, 8 * BLOCK))
@settings(max_examples=60, deadline=None)
def test_a_mixture_keeps_its_shares_and_each_source_its_own_order(mixture: Mixture, size: int) -> None:
    stream = triples(mixture.rows(0, size))
    total = sum(w * o.samples for w, o in zip(mixture.weights, mixture.orders, strict=True))
    offset = 0
    for weight, order in zip(mixture.weights, mixture.orders, strict=True):
        own = [(s - offset, r, p) for s, r, p in stream if offset <= s < offset + len(order.counts)]
        assert own == triples(order.rows(0, len(own)))
        assert abs(len(own) - size * weight * order.samples / total) <= BLOCK / 2
        whole = [s for s, _, _ in stream[: size // BLOCK * BLOCK] if offset <= s < offset + len(order.counts)]
        assert abs(len(whole) - len(stream[: size // BLOCK * BLOCK]) * weight * order.samples / total) <= 1
        offset += len(order.counts)


@given(mixtures(), st.integers(0, 3000))
@settings(max_examples=40, deadline=None)
def test_the_coming_windows_of_a_mixture_hold_its_samples(mixture: Mixture, position: int) -> None:
    size = 700
    windows = []
    for window in mixture.coming(position):
        if window.start >= position + size and len(windows) > 20:
            break
        windows.append(window)
    assert [w.start for w in windows] == sorted(w.start for w in windows)
    for place in range(position, position + size, 50):
        held = {s for w in windows if w.start <= place < w.stop for s in w.shards}
        assert set(mixture.rows(place, place + 1).shard.tolist()) <= held


def test_seeds_and_passes_give_different_orders() -> None:
    def stream(seed: int, pass_: int) -> list[tuple[int, int, int]]:
        return [t[:2] for t in triples(Order((50, 50, 50), seed, window=2).rows(pass_ * 150, pass_ * 150 + 150))]

    assert stream(0, 0) == stream(0, 0)
    assert len({tuple(stream(seed, pass_)) for seed in range(4) for pass_ in range(4)}) == 16


def test_without_shuffling_the_order_is_that_of_the_files() -> None:
    assert triples(Order((2, 0, 1), seed=3, shuffle=False).rows(0, 4)) == [(0, 0, 0), (0, 1, 0), (2, 0, 0), (0, 0, 1)]


def test_samples_mix_within_a_window_and_not_beyond_it() -> None:
    order = Order((20,) * 6, seed=1, window=2)
    for index, shards in enumerate(order.windows(0)):
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
