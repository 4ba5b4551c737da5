"""Clusters of nodes with a cache each: what every node decodes, and that losses are the same on any number of them."""

from __future__ import annotations

import json
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from faults import STORE, Site, drain

pytestmark = [pytest.mark.long, pytest.mark.ray]
SHARDS, LANES, STEPS = 64, 16, (40, 12)


class Apart(Site):
    """A site whose nodes have a home folder each, and in it their cache."""

    homes: int = 0

    def home(self, index: int) -> Path:
        """Of the node that came as number `index`."""
        return self.folder / f"home-{index}"

    def add_node(self) -> None:
        home = self.home(self.homes)
        home.mkdir()
        self.homes += 1
        self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=STORE, env_vars={"HOME": str(home)}))

    def decoded(self, index: int) -> list[int]:
        """How many shards of each stage the node has decoded."""
        kinds: dict[str, set[str]] = {}
        for file in sorted(self.home(index).rglob("*.arrow"), key=lambda path: path.stat().st_mtime):
            identity, _, kind = file.stem.partition("-")
            kinds.setdefault(kind, set()).add(identity)
        return [len(found) for found in kinds.values()]


@pytest.fixture(scope="module")
def shards(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's 1,200 pictures in 64 shards."""
    out = tmp_path_factory.mktemp("many")
    tars = [tarfile.TarFile(out / f"{i:05}.tar", "w") for i in range(SHARDS)]
    numbers: dict[str, int] = {}
    for path in sorted((demo / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                number = numbers.setdefault(member.name.partition(".")[0], len(numbers))
                tars[number % SHARDS].addfile(member, tar.extractfile(member))
    for tar in tars:
        tar.close()
    assert len(numbers) == 1200
    return out


def experiment(shards: Path, storage: Path, workers: Any, steps: tuple[int, ...]) -> dict[str, Any]:
    """The second stage reads larger pictures, so that what it reads is decoded for it."""
    data = {"train": f"{shards}/*.tar", "lanes": LANES, "captions": {"keys": ["txt", "json.captions"], "per_image": 2}}
    stages = [{"model": f"CoM-micro-{m}", "epochs": f"{n} steps"} for m, n in zip("SM", steps, strict=False)]
    stages[1:] = [stage | {"data": {"image_size": 48}} for stage in stages[1:]]
    return {
        "name": "chain",
        "data": data,
        "chain": stages,
        "train": {"global_batch": 32, "warmup": "10 %", "log_every": 1, "precision": "fp32"},
        "compute": {"workers": workers, "cpus_per_worker": 1},
        "preload": {"cache": "~/cache", "cpus": 1},
        "checkpoint": {"every": "3 seconds"},
        "evaluate": {},
        "storage": str(storage),
    }


def losses(site: Site) -> dict[tuple[int, int], float]:
    lines = [json.loads(line) for line in (site.out / "metrics.jsonl").read_text().splitlines()]
    return {(x["stage"], x["step"]): x["loss"] for x in lines}


def worlds(site: Site) -> list[int]:
    """The numbers of workers, one after the other."""
    lines = [json.loads(line)["world_size"] for line in (site.out / "metrics.jsonl").read_text().splitlines()]
    return [b for a, b in zip([0, *lines], lines, strict=False) if a != b]


def deviation(found: dict[tuple[int, int], float], expected: dict[tuple[int, int], float]) -> float:
    """The largest, relative, of steps that the other one has too."""
    assert found.keys() <= expected.keys()
    return max(abs(loss / expected[place] - 1) for place, loss in found.items())


def trained(shards: Path, folder: Path, nodes: int, steps: tuple[int, ...]) -> Apart:
    """A finished run on so many nodes, each with a worker."""
    folder.mkdir()
    with Apart(experiment(shards, folder / "runs", nodes, steps), folder, nodes) as site:
        site.start()
        site.wait(lambda: False, 500)
        assert site.driver
        assert site.driver.returncode == 0, site.log.read_text()
        assert worlds(site) == [nodes]
        return site


def test_each_of_n_nodes_decodes_its_nth_and_losses_are_the_same(shards: Path, tmp_path: Path) -> None:
    """Preloaders, which have room for the whole set, prepare nothing of other nodes either, nor for the next stage."""
    sites = {nodes: trained(shards, tmp_path / str(nodes), nodes, STEPS) for nodes in (1, 2, 4)}
    for nodes, site in sites.items():
        decoded = [site.decoded(index) for index in range(nodes)]
        worst = deviation(losses(site), losses(sites[1]))
        assert len(losses(site)) == sum(STEPS)
        print(f"{nodes} nodes: decoded {decoded} of {SHARDS} for the two stages, losses within {worst:.1e}")
        assert worst < 1e-4
        for found in decoded:
            assert len(found) == 2
            assert all(count <= 1.05 * SHARDS / nodes + 2 for count in found), "and those at which lanes are cut"
        assert sum(found[0] for found in decoded) >= SHARDS


def stop(site: Apart) -> None:
    """Has the driver save and end, as it does on SIGTERM."""
    assert site.driver
    site.driver.terminate()
    site.driver.wait(120)


def test_losses_stay_the_same_while_nodes_come_go_and_are_lost(shards: Path, tmp_path: Path) -> None:
    """2 → 1 (lost) → 3 → 2 (drained) in the middle of a stage; then the same steps on one node."""
    folders = [tmp_path / name for name in ("elastic", "alone")]
    for folder in folders:
        folder.mkdir()
    trees = [
        experiment(shards, folder / "runs", workers, (100_000,))
        for folder, workers in zip(folders, ([1, 3], 1), strict=True)
    ]
    with Apart(trees[0], folders[0]) as site:

        def goes_on(workers: int) -> None:
            site.wait(lambda: worlds(site)[-1:] == [workers], 240)
            reached = site.place()
            site.wait(lambda: site.place() >= (0, reached[1] + 40), 120)

        site.start()
        site.wait(lambda: site.place() > (0, 40), 240)
        site.cluster.remove_node(site.nodes.pop(0), allow_graceful=False)
        goes_on(1)
        site.add_node()
        site.add_node()
        goes_on(3)
        leaving = site.nodes.pop(0)
        drain(site, leaving, 8)
        time.sleep(8)
        site.cluster.remove_node(leaving, allow_graceful=False)
        goes_on(2)
        stop(site)
        assert worlds(site) == [2, 1, 3, 2], site.log.read_text()
        print(f"decoded {[site.decoded(index) for index in range(site.homes)]} of {SHARDS}")
        found = losses(site)
    with Apart(trees[1], folders[1], 1) as site:
        site.start()
        site.wait(lambda: site.place() >= max(found), 400)
        stop(site)
        worst = deviation(found, losses(site))
    print(f"{len(found)} steps, losses within {worst:.1e}")
    assert len(found) == max(step for _, step in found)
    assert worst < 1e-4
