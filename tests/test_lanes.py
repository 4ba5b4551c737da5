"""A node reads and prepares its own lanes alone, and the batches are the same on any number of nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_feed import BUDGET, READER, SPEC, WANTED, numbers, sample, write
from test_golden import write_shards
from test_preload import until

from raychain.config.loading import validate
from raychain.data.cache import ShardCache
from raychain.data.loader import Batch, Feed, Loader, lanes_of
from raychain.data.mixture import Mixture
from raychain.data.order import Order, Stream
from raychain.data.pictures import PictureReader
from raychain.data.preload import Item, Preloader, Ranks, Source, first_windows, wanted
from raychain.data.shards import Shard, survey
from raychain.errors import InputError
from raychain.runs.resolve import make_task
from raychain.training.task import StageTask

SHARDS, SAMPLES, LANES, BATCH, NODE = 48, 5, 8, 24, 2
"""`NODE`: ranks of a node."""
PASS = SHARDS * SAMPLES // BATCH


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    folder = tmp_path_factory.mktemp("lanes")
    paths = [
        write(folder / f"{i:02}.tar", [sample((i * SAMPLES + n) % 256) for n in range(SAMPLES)]) for i in range(SHARDS)
    ]
    return survey(paths, WANTED, folder / "counts", "data.train")


def feed(shards: Sequence[Shard], order: Stream | None = None, reader: PictureReader = READER) -> Feed:
    return Feed(tuple(shards), order or Order((SAMPLES,) * len(shards), seed=3, lanes=LANES), reader)


class Node:
    """Some ranks and the cache that they share."""

    def __init__(self, folder: Path, budget: int = BUDGET) -> None:
        self.cache = ShardCache(folder, budget)

    def decoded(self) -> int:
        """Shards that it has decoded."""
        return len(list(self.cache.root.rglob("*.arrow")))

    def read(self, source: Feed, node: int, nodes: int, start: int, stop: int) -> list[list[Batch]]:
        """What its ranks read, each: it is the node `node` of `nodes`."""
        ranks, world = range(node * NODE, (node + 1) * NODE), nodes * NODE
        loaders = [
            Loader(source, self.cache, global_batch=BATCH, start=start, stop=stop, rank=rank, world=world, node=ranks)
            for rank in ranks
        ]
        try:
            return [list(loader) for loader in loaders]
        finally:
            for loader in loaders:
                loader.close()


def read(source: Feed, nodes: Sequence[Node], start: int, stop: int) -> list[dict[str, torch.Tensor]]:
    """The global batches that so many nodes read together."""
    parts = [part for i, node in enumerate(nodes) for part in node.read(source, i, len(nodes), start, stop)]
    return [
        {name: torch.cat([batch[name] for batch in batches]) for name in batches[0].columns}
        for batches in zip(*parts, strict=True)
    ]


def same(a: Sequence[dict[str, torch.Tensor]], b: Sequence[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_each_of_n_nodes_decodes_its_nth_of_the_shards(nodes: int, shards: list[Shard], tmp_path: Path) -> None:
    group = [Node(tmp_path / str(i)) for i in range(nodes)]
    steps = read(feed(shards), group, 0, 2 * PASS)
    assert same(steps, read(feed(shards), [Node(tmp_path / "alone")], 0, 2 * PASS))
    for node in group:
        assert node.decoded() <= SHARDS / nodes * 1.05 + 2, "and the shards at which lanes are cut"
    first = torch.cat([step["tokens"][:, 0, 0] for step in steps[:PASS]])
    assert sorted(first.tolist()) == sorted(n % 256 for n in range(SHARDS * SAMPLES)), "each sample once a pass"


def test_batches_stay_the_same_while_nodes_come_and_go(shards: list[Shard], tmp_path: Path) -> None:
    alone = read(feed(shards), [Node(tmp_path / "alone")], 0, 2 * PASS)
    group = [Node(tmp_path / str(i)) for i in range(3)]
    edges = [0, 4, 9, 13, 2 * PASS]
    steps = []
    for count, start, stop in zip((2, 1, 3, 2), edges, edges[1:], strict=False):
        steps += read(feed(shards), group[:count], start, stop)
    assert same(steps, alone)


@pytest.mark.parametrize("batch", [24, 10, 3])
def test_batches_do_not_depend_on_the_ranks_however_lanes_and_batch_divide(
    batch: int, shards: list[Shard], tmp_path: Path
) -> None:
    """Windows of two sizes, parts of a lane for several ranks, and batches that pass over windows."""
    cache = ShardCache(tmp_path, BUDGET)
    orders = [Order((SAMPLES,) * SHARDS, 1, window=window, lanes=lanes) for window, lanes in [(8, 3), (1, 8), (40, 8)]]
    halves = tuple(Order((SAMPLES,) * 24, seed, lanes=4) for seed in (1, 2))
    for order in (*orders, Mixture(halves, (1.0, 3.0), 3)):
        found = {}
        for world in (1, 2, 3):
            parts = []
            for rank in range(world):
                with Loader(
                    feed(shards, order), cache, global_batch=batch, start=2, stop=12, rank=rank, world=world
                ) as loader:
                    parts.append(list(loader))
            found[world] = [{"t": torch.cat([b["tokens"] for b in batches])} for batches in zip(*parts, strict=True)]
        assert same(found[1], found[2])
        assert same(found[1], found[3])
        rows = order.rows(5 * batch, 6 * batch)
        wanted_numbers = (rows.shard * SAMPLES + rows.row) % 256
        assert found[1][3]["t"][:, 0, 0].tolist() == wanted_numbers.tolist()


def test_a_loader_of_one_lane_decodes_several_shards_ahead(shards: list[Shard], tmp_path: Path) -> None:
    """Ranks of one lane would else wait for the same shard, one after the other."""
    node, own = Node(tmp_path), lanes_shards(Source(feed(shards), BATCH), Ranks((0,), LANES))
    with Loader(feed(shards), node.cache, global_batch=BATCH, start=0, stop=99, rank=0, world=LANES) as loader:
        next(iter(loader))
        assert until(lambda: node.decoded() == len(own))


def test_two_stages_of_different_lanes_share_one_cache(shards: list[Shard], tmp_path: Path) -> None:
    node = Node(tmp_path)
    for lanes in (1, 4, 16):
        order = Order((SAMPLES,) * SHARDS, seed=3, lanes=lanes)
        steps = read(feed(shards, order), [node], 0, PASS)
        assert sorted(n for step in steps for n in step["tokens"][:, 0, 0].tolist()) == sorted(
            n % 256 for n in range(SHARDS * SAMPLES)
        )
    assert node.decoded() == SHARDS


def test_two_runs_of_different_lanes_share_one_cache_at_once(shards: list[Shard], tmp_path: Path) -> None:
    """Room for a third of the set: each run removes what the other does not hold, and both get their batches."""
    one = least(shards, tmp_path / "probe")
    feeds = [feed(shards, Order((SAMPLES,) * SHARDS, seed=3, lanes=lanes)) for lanes in (2, 8)]
    alone = [read(source, [Node(tmp_path / f"alone {i}")], 0, 2 * PASS) for i, source in enumerate(feeds)]
    group = [Node(tmp_path / "shared", budget=int(one * 40.5)) for _ in feeds]  # a cache object each, as processes have
    with ThreadPoolExecutor(len(feeds)) as pool:
        together = list(pool.map(lambda source, node: read(source, [node], 0, 2 * PASS), feeds, group))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert group[0].decoded() <= 40


def test_no_budget_and_no_number_of_workers_or_nodes_changes_a_key_or_a_batch(
    shards: list[Shard], tmp_path: Path
) -> None:
    write_shards(tmp_path / "data", shards=33, samples=6)

    def keys(**machine: Any) -> list[str]:
        tree = {
            "name": "lanes",
            "data": {"train": f"{tmp_path}/data", "captions": {"keys": ["txt"]}, "crop": [0.5, 1.0]},
            "chain": [{"model": f"CoM-micro-{m}", "epochs": "10 steps"} for m in "SM"],
            "train": {"global_batch": 16, "warmup": "10 %", "precision": "fp32"},
            **machine,
        }
        tree["preload"] = {"cache": str(tmp_path / "cache")} | tree.get("preload", {})
        return [stage.key for stage in make_task(validate(tree), str(tmp_path / "out")).stages]

    own = keys()
    for machine in (
        {"preload": {"budget": 10**7, "cpus": 0}},
        {"preload": {"budget": 10**13, "cache": str(tmp_path / "other")}},
        {"compute": {"workers": 4}},
        {"compute": {"workers": [1, 16], "gpus_per_worker": 0, "cpus_per_worker": 7}},
    ):
        assert keys(**machine) == own, machine
    one = least(shards, tmp_path / "probe")
    steps = read(feed(shards), [Node(tmp_path / "roomy")], 0, 2 * PASS)
    for nodes, room in ((1, 9.5), (2, 9.5), (4, 5.5)):
        group = [Node(tmp_path / f"{nodes} {i}", budget=int(one * room)) for i in range(nodes)]
        assert same(read(feed(shards), group, 0, 2 * PASS), steps)


def test_lanes_change_the_key_and_one_lane_is_the_former_order(tmp_path: Path) -> None:
    """Of 32 shards on, unless `data.lanes: 1` says so; nothing else about them is part of a key."""
    write_shards(tmp_path / "data", shards=33, samples=6)

    def stage(**data: Any) -> StageTask:
        tree = {
            "name": "lanes",
            "data": {"train": f"{tmp_path}/data", "captions": {"keys": ["txt"]}, **data},
            "chain": [{"model": "CoM-micro-S", "epochs": "10 steps"}],
            "train": {"global_batch": 16, "warmup": "10 %"},
            "preload": {"cache": str(tmp_path / "cache")},
        }
        return make_task(validate(tree), str(tmp_path / "out")).stages[0]

    own, former, few = stage(), stage(lanes=1), stage(train=f"{tmp_path}/data/000[012]*.tar")
    assert [own.feed.order.lanes, former.feed.order.lanes, few.feed.order.lanes] == [2, 1, 1]
    assert len({own.key, former.key, stage(lanes=4).key}) == 3
    assert own.key == stage(lanes=2).key
    assert former.feed.order == Order((6,) * 33, 0)
    assert few.key == stage(train=f"{tmp_path}/data/000[012]*.tar", lanes=1).key


@pytest.mark.parametrize("train", [["a"], [{"shards": "a", "weight": 2}, "b"]])
def test_more_lanes_than_samples_are_refused(train: list[Any], tmp_path: Path) -> None:
    for name, samples in (("a", 6), ("b", 40)):
        write_shards(tmp_path / name, shards=2, samples=samples)
    sources = [
        {**s, "shards": f"{tmp_path}/{s['shards']}"} if isinstance(s, dict) else f"{tmp_path}/{s}" for s in train
    ]
    tree = {
        "name": "lanes",
        "data": {"train": sources, "lanes": 13},
        "chain": [{"model": "CoM-micro-S", "epochs": "10 steps"}],
        "train": {"global_batch": 4, "warmup": "10 %"},
        "preload": {"cache": str(tmp_path / "cache")},
    }
    with pytest.raises(InputError, match=r"data\.lanes\n  given    13\n  allowed  at most the 12 samples of"):
        make_task(validate(tree), str(tmp_path / "out"))


def least(shards: Sequence[Shard], folder: Path) -> int:
    """Bytes of a decoded shard."""
    probe = ShardCache(folder, BUDGET)
    probe.table(shards[0], READER)
    return probe.size(shards[0], READER)


def test_a_budget_bounds_a_nodes_share(shards: list[Shard], tmp_path: Path) -> None:
    """Two nodes with room for half of the set each keep it; what is too small for a node's windows names both sizes."""
    one = least(shards, tmp_path / "probe")
    group = [Node(tmp_path / str(i), budget=int(one * (SHARDS // 2 + 2.5))) for i in range(2)]
    read(feed(shards), group, 0, PASS)
    assert [node.decoded() for node in group] == [SHARDS // 2, SHARDS // 2]
    small = Node(tmp_path / "small", budget=int(one * 3.5))
    for node, nodes, needed in ((0, 2, 4), (0, 1, 8)):
        message = (
            rf"preload\.budget is {small.cache.budget} bytes; the {needed} shards .* need about {needed * one // 100}"
        )
        with pytest.raises(OSError, match=message):
            small.read(feed(shards), node, nodes, 0, PASS)


@pytest.fixture
def stages(shards: list[Shard]) -> list[Source]:
    """The second has other lanes, and another resolution."""
    larger = PictureReader(dataclasses.replace(SPEC, image_size=20), numbers)
    order = Order((SAMPLES,) * SHARDS, seed=4, lanes=4)
    return [Source(feed(shards), BATCH), Source(feed(shards, order, larger), BATCH)]


def lanes_shards(source: Source, node: Ranks) -> set[int]:
    order = source.feed.order
    lanes = [order.lane(lane) for lane in lanes_of(order, BATCH, *node)]
    return {s for lane in lanes for s in lane.rows(0, lane.samples).shard.tolist()}


def test_what_is_wanted_on_a_node_are_its_lanes_those_of_the_next_stage_too(stages: list[Source]) -> None:
    found = {}
    for node in range(2):
        ranks = Ranks(range(node * NODE, (node + 1) * NODE), 2 * NODE)
        items = list(wanted(stages, 0, 3, ranks))
        assert {item.shard for item in items if item.stage == 0} == lanes_shards(stages[0], ranks)
        following = [item.shard for item in items if item.stage == 1]
        assert following == first_windows(stages[1], ranks)
        assert set(following) <= lanes_shards(stages[1], ranks)
        assert [item.stage for item in items[:8]] == [0] * 8, "four lanes' windows and the next ones"
        found[node] = {item.shard for item in items if item.stage == 0}
    assert found[0] | found[1] == set(range(SHARDS))
    assert len(found[0] & found[1]) <= 1
    assert {item.shard for item in wanted(stages, 0, 0)} == set(range(SHARDS))


def test_a_preloader_leaves_nothing_to_decode_and_nothing_of_other_nodes(
    stages: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, ranks = Node(tmp_path), Ranks(range(NODE), 2 * NODE)
    preloader = Preloader(stages, node.cache, 2.0, ranks)
    try:
        preloader.report(0, 0, 0.0)
        own, following = lanes_shards(stages[0], ranks), set(first_windows(stages[1], ranks))
        assert until(lambda: node.decoded() == len(own) + len(following))
        assert not until(lambda: node.decoded() > len(own) + len(following), 0.7)
    finally:
        preloader.close()
    make: Callable[..., None] = lambda *_: pytest.fail("decoded again")  # noqa: E731
    monkeypatch.setattr(ShardCache, "_make", make)
    node.read(stages[0].feed, 0, 2, 0, PASS)
    assert all(node.cache.touch(stages[1].feed.shards[i.shard], stages[1].feed.reader)
               for i in wanted(stages, 0, 0, ranks) if i == Item(1, i.shard))  # fmt: skip
