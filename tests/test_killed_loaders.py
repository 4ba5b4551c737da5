"""Loaders killed at any moment, and continued at other world sizes, read exactly what undisturbed ones read."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from test_feed import READER, WANTED, sample, write

from raychain.data.cache import ShardCache
from raychain.data.loader import Feed, Loader
from raychain.data.order import Order
from raychain.data.shards import Shard, survey

BATCH, STEPS, KILLS = 12, 1500, 20
SIZES = (7, 5, 9, 12, 3, 8, 11)


def consume(feed: Feed, cache: Path, log: Path, start: int, rank: int, world: int) -> None:
    """Writes a line a step: the step, then the numbers of this rank's samples."""
    loader = Loader(feed, ShardCache(cache, 2**22), global_batch=BATCH, start=start, stop=STEPS, rank=rank, world=world)
    with loader, log.open("a") as file:
        for batch in loader:
            file.write(f"{batch.step} {' '.join(map(str, batch['tokens'][:, 0, 0].tolist()))}\n")
            file.flush()
            time.sleep(0.002)


def lines(log: Path) -> dict[int, list[int]]:
    """Step → numbers; a line cut short by the kill is dropped."""
    found = {}
    for line in log.read_text().splitlines(keepends=True) if log.exists() else []:
        if line.endswith("\n"):
            step, *values = map(int, line.split())
            found[step] = values
    return found


@pytest.mark.slow
def test_killed_at_random_moments_and_world_sizes_each_batch_holds_the_same_samples(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_killed_loaders"])
    ends = [sum(SIZES[:i]) for i in range(len(SIZES) + 1)]
    paths = [write(tmp_path / f"{i}.tar", [sample(n) for n in range(ends[i], ends[i + 1])]) for i in range(len(SIZES))]
    shards: list[Shard] = survey(paths, WANTED, tmp_path / "counts", "data.train")
    order = Order(tuple(shard.samples for shard in shards), seed=5, window=3)
    feed = Feed(tuple(shards), order, READER)
    rng = random.Random(0)
    consumed: dict[int, list[int]] = {}
    worlds = [1, 2, 3, 4] * (KILLS // 4) + [2]
    for attempt, world in enumerate(worlds):
        start = len(consumed)
        logs = [tmp_path / f"{attempt}-{rank}.log" for rank in range(world)]
        processes = [
            context.Process(target=consume, args=(feed, tmp_path / "cache", logs[rank], start, rank, world))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        if attempt < KILLS:
            time.sleep(rng.uniform(0.02, 0.5))
            for process in rng.sample(processes, world):
                process.kill()
        for process in processes:
            process.join(60)
        found = [lines(log) for log in logs]
        # The group goes on after the last step that all ranks finished, as from a checkpoint.
        step = start
        while all(step in rank for rank in found):
            consumed[step] = [number for rank in found for number in rank[step]]
            step += 1
        if attempt < KILLS:
            assert len(consumed) < STEPS, "the last kills would hit nothing: raise STEPS"
    assert sorted(consumed) == list(range(STEPS))
    rows = order.rows(0, STEPS * BATCH)
    expected = [ends[shard] + row for shard, row in zip(rows.shard.tolist(), rows.row.tolist(), strict=True)]
    assert [n for step in range(STEPS) for n in consumed[step]] == expected
    passes = STEPS * BATCH // order.samples
    counts = Counter(expected[: passes * order.samples])
    assert set(counts.values()) == {passes}
    assert len(counts) == order.samples
