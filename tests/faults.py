"""A chain on a small Ray cluster of this machine, faults that hit it, and the comparison with an undisturbed run.

`python tests/faults.py --faults 30` runs chains until so many seeded random faults have hit them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import psutil
import torch
import yaml
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

STORE = 10**8
"""Bytes of each node's object store."""
STEPS = (400, 200, 60)
"""Of the three stages."""


def experiment(
    demo: Path, storage: Path, cache: Path, steps: tuple[int, ...] = STEPS, lanes: int = 1
) -> dict[str, Any]:
    """A three-stage chain on one to two workers that logs every step and saves every three seconds."""
    captions = {"keys": ["txt", "json.captions"], "per_image": 2}
    return {
        "name": "chain",
        "data": {"train": f"{demo}/train/*.tar", "lanes": lanes, "captions": captions},
        "chain": [{"model": f"CoM-micro-{m}", "epochs": f"{n} steps"} for m, n in zip("SML", steps, strict=True)],
        "train": {"global_batch": 32, "warmup": "10 %", "log_every": 1, "precision": "fp32"},
        "compute": {"workers": [1, 2], "cpus_per_worker": 1, "max_failures": 3},
        "preload": {"cache": str(cache)},
        "checkpoint": {"every": "3 seconds"},
        "storage": str(storage),
    }


class Site:
    """A head without workers, worker nodes of one CPU each, and a driver that trains `tree` on them."""

    def __init__(self, tree: dict[str, Any], folder: Path, nodes: int = 2) -> None:
        self.out, self.folder = Path(tree["storage"]) / tree["name"], folder
        self.file, self.log = folder / "experiment.yaml", folder / "driver.log"
        self.file.write_text(yaml.safe_dump(tree))
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []
        self.notices: list[float] = []
        """When nodes were told that they will be taken away."""
        for _ in range(nodes):
            self.add_node()
        self.driver: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        if self.driver and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()
        self.cluster.shutdown()

    def add_node(self) -> None:
        """One more node of one CPU."""
        self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=STORE))

    def start(self, *options: str, program: str = "raychain.run") -> None:
        """The README's command, on this cluster."""
        command = [sys.executable, "-m", program, str(self.file), "--address", self.cluster.address, *options]
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(command, stdout=log, stderr=log)

    def processes(self, title: str) -> list[psutil.Process]:
        """The cluster's processes whose title holds `title`: RayTrainWorker, PreloadActor, ray::TrainController."""
        found = []
        for node in [self.cluster.head_node, *self.nodes]:
            for raylet in node.all_processes.get("raylet", []):
                for process in _children(raylet.process.pid):
                    try:
                        if title in " ".join(process.cmdline()):
                            found.append(process)
                    except psutil.Error:
                        continue
        return found

    def place(self) -> tuple[int, int]:
        """Stage and step of the last logged step; (-1, 0) before the first."""
        try:
            with (self.out / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
                whole = [line for line in file.read().splitlines(keepends=True)[1:] if line.endswith(b"\n")]
        except OSError:
            return -1, 0
        last = json.loads(whole[-1]) if whole else {"stage": -1, "step": 0}
        return last["stage"], last["step"]

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Until `done`, the end of the driver (False) or `seconds` are over (TimeoutError)."""
        until = time.monotonic() + seconds
        while not done():
            if self.driver is None or self.driver.poll() is not None:
                return False
            if time.monotonic() > until:
                raise TimeoutError(f"{self.place()} after {seconds} s\n{self.log.read_text()}")
            time.sleep(0.1)
        return True


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def kill_worker(site: Site, rng: random.Random) -> None:
    """A worker process is killed."""
    workers: list[psutil.Process] = []
    site.wait(lambda: bool(workers.extend(site.processes("RayTrainWorker")) or workers), 60)
    rng.choice(workers).kill()


def kill_controller(site: Site, rng: random.Random) -> None:
    """The process of Ray Train's controller is killed."""
    controllers: list[psutil.Process] = []
    site.wait(lambda: bool(controllers.extend(site.processes("ray::TrainController")) or controllers), 60)
    controllers[0].kill()


def kill_preloader(site: Site, rng: random.Random) -> None:
    """The actor that prepares the next stage's data is killed."""
    preloaders = site.processes("PreloadActor")
    if preloaders:
        rng.choice(preloaders).kill()


def kill_node(site: Site, rng: random.Random) -> None:
    """A node is lost without notice, its workers with it; another comes."""
    site.cluster.remove_node(site.nodes.pop(rng.randrange(len(site.nodes))), allow_graceful=False)
    time.sleep(rng.uniform(0, 4))
    site.add_node()


def lose_node(site: Site, rng: random.Random) -> None:
    """A node is lost without notice; another comes when the chain goes on without it."""
    before = site.place()
    site.cluster.remove_node(site.nodes.pop(rng.randrange(len(site.nodes))), allow_graceful=False)
    time.sleep(1)  # what was trained before is logged by now
    reached = max(site.place(), before)
    site.wait(lambda: site.place() > reached, 180)
    site.add_node()


def drain_node(site: Site, rng: random.Random) -> None:
    """A node is taken away with notice; another comes."""
    node = site.nodes.pop(rng.randrange(len(site.nodes)))
    drain(site, node, 8)
    site.add_node()
    time.sleep(8)
    site.cluster.remove_node(node, allow_graceful=False)


def drain(site: Site, node: Any, seconds: int) -> None:
    """The notice a cloud provider gives for a spot node."""
    subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "drain-node",
                "--address",
                site.cluster.address,
                "--node-id",
                node.node_id,
            ),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
            *("--deadline-remaining-seconds", str(seconds)),
        ],
        check=True,
        capture_output=True,
    )
    site.notices.append(time.time())


def kill_driver(site: Site, rng: random.Random) -> None:
    """The driver is killed without notice, and started again."""
    assert site.driver
    site.driver.kill()
    site.driver.wait()
    time.sleep(rng.uniform(0, 3))
    site.start()


def stop_driver(site: Site, rng: random.Random) -> None:
    """SIGTERM, as `ray job stop` or a rescheduled pod sends it; killed three seconds later, and started again."""
    assert site.driver
    site.driver.send_signal(signal.SIGTERM)
    try:
        site.driver.wait(3)
    except subprocess.TimeoutExpired:
        site.driver.kill()
        site.driver.wait()
    site.start()


FAULTS = (kill_worker, kill_node, drain_node, kill_driver, stop_driver, kill_controller, kill_preloader)


class Published:
    """Watches that what was published is never written again."""

    def __init__(self, out: Path) -> None:
        self.out, self.seen = out, dict[str, int]()

    def check(self) -> None:
        for record in self.out.glob("stages/*/stage.json"):
            written = (record.parent / "open_clip_model.safetensors").stat().st_mtime_ns
            assert self.seen.setdefault(record.parent.name, written) == written, f"{record.parent.name} trained twice"


def places(rng: random.Random, steps: tuple[int, ...], count: int) -> list[tuple[int, int]]:
    """So many (stage, step), as evenly over the stages as it goes and at random steps of the first 70 % of each."""
    return sorted((i % len(steps), rng.randrange(1, int(0.7 * steps[i % len(steps)]))) for i in range(count))


def disturbed(
    site: Site, rng: random.Random, faults: list[Callable[[Site, random.Random], None]], at: list[tuple[int, int]]
) -> list[dict]:
    """Runs the site's chain to its end under `faults`, each when the chain has come to its place; what they cost.

    Two of close places hit at once when the chain goes on after the first. Stops hitting when the chain ends first.
    Raises AssertionError or TimeoutError where the chain does not get over it.
    """
    published, hits = Published(site.out), []
    site.start()
    for fault, place in zip(faults, at, strict=True):
        if not site.wait(lambda place=place: site.place() >= place, 300):
            break
        time.sleep(rng.uniform(0, 0.2))
        before, began = site.place(), time.monotonic()
        fault(site, rng)
        if site.driver and site.driver.poll() is not None:
            break
        time.sleep(1)  # what was trained before the fault is logged by now
        reached = max(site.place(), before)
        site.wait(lambda reached=reached: site.place() > reached, 180)
        published.check()
        hits.append({"fault": fault.__name__, "at": before, "seconds": round(time.monotonic() - began, 1)})
        print(f"{fault.__name__:16} at stage {before[0]} step {before[1]}: {hits[-1]['seconds']} s", flush=True)
    site.wait(lambda: False, 600)
    published.check()
    assert site.driver
    assert site.driver.returncode == 0, site.log.read_text()
    return hits


def costs(site: Site) -> tuple[list[float], list[float]]:
    """Seconds from each detected loss to the first new step, and from each notice of a drain to the saved state."""
    run = json.loads((site.out / "run.json").read_text())
    steps = sorted(json.loads(line)["time"] for line in (site.out / "metrics.jsonl").read_text().splitlines())
    bars = json.loads((site.out / "trace.json").read_text())["traceEvents"]
    saved = sorted((bar["ts"] + bar["dur"]) / 1e6 for bar in bars if bar.get("cat") == "checkpoint")
    lost = [restart["time"] for restart in run["restarts"] if restart["reason"] == "failure"]
    again = [next((t - at for t in steps if t > at), None) for at in lost]
    drains = [restart["time"] for restart in run["restarts"] if restart["reason"] == "drain"]
    noticed = [min(at, *(n for n in site.notices if abs(n - at) < 10)) for at in drains]  # the command may end later
    kept = [next((t - since for t in saved if t > at), None) for at, since in zip(drains, noticed, strict=True)]
    return [s for s in again if s is not None], [s for s in kept if s is not None]


def compare(found: Path, expected: Path) -> tuple[float, float]:
    """Largest relative deviation of a step's loss, and of the last stage's weights (norm of the difference)."""
    runs = [json.loads((out / "run.json").read_text()) for out in (found, expected)]
    assert [s["samples_seen"] for s in runs[0]["stages"]] == [s["samples_seen"] for s in runs[1]["stages"]]
    curves = []
    for out in (found, expected):
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        places = [(x["stage"], x["step"]) for x in lines]
        assert len(places) == len(set(places)), "a step was logged twice"
        curves.append({place: x["loss"] for place, x in zip(places, lines, strict=True)})
    assert curves[0].keys() == curves[1].keys(), "steps are missing"
    weights = [
        load_file(out / s["stages"][-1]["checkpoint"] / "open_clip_model.safetensors")
        for out, s in zip((found, expected), runs, strict=True)
    ]
    flat = [torch.cat([w[name].double().flatten() for name in sorted(w)]) for w in weights]
    loss = max(abs(value / curves[1][place] - 1) for place, value in curves[0].items())
    return loss, float((flat[0] - flat[1]).norm() / flat[1].norm())


def undisturbed(tree: dict[str, Any], folder: Path) -> Path:
    """The same chain without faults on one worker, in a process of its own; its run folder."""
    tree = tree | {"storage": str(folder / "undisturbed"), "compute": {"workers": 1, "cpus_per_worker": 1}}
    file = folder / "undisturbed.yaml"
    file.write_text(yaml.safe_dump(tree))
    subprocess.run([sys.executable, "-m", "raychain.run", str(file)], check=True, capture_output=True)
    return Path(tree["storage"]) / tree["name"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--a-chain", type=int, default=6, help="faults that are to hit each chain, at the most")
    parser.add_argument("--only", nargs="+", choices=[fault.__name__ for fault in (*FAULTS, lose_node)])
    options = parser.parse_args()
    kinds = [fault for fault in (*FAULTS, lose_node) if fault.__name__ in options.only] if options.only else FAULTS
    from raychain.demo import make_demo

    rng, hits = random.Random(options.seed), []
    again: list[float] = []
    kept: list[float] = []
    with tempfile.TemporaryDirectory(prefix="raychain-faults-") as scratch:
        root = Path(scratch)
        make_demo(root / "demo", names=30, pictures=1200, held_out=100, per_name=3)
        expected = undisturbed(experiment(root / "demo", root, root / "cache"), root)
        worst: list[tuple[float, float]] = []
        while len(hits) < options.faults:
            folder = root / f"chain-{len(worst)}"
            folder.mkdir()
            count = min(options.a_chain, options.faults - len(hits))
            faults = [kinds[(len(hits) + i) % len(kinds)] for i in range(count)]
            rng.shuffle(faults)
            with Site(experiment(root / "demo", folder / "runs", root / "cache"), folder) as site:
                hits += disturbed(site, rng, faults, places(rng, STEPS, count))
                worst.append(compare(site.out, expected))
                again, kept = (a + b for a, b in zip((again, kept), costs(site), strict=True))
            deviation = f"deviation of losses {worst[-1][0]:.1e}, of weights {worst[-1][1]:.1e}"
            print(f"chain {len(worst)}: finished; {deviation}", flush=True)
    for name in sorted({hit["fault"] for hit in hits}):
        seconds = [hit["seconds"] for hit in hits if hit["fault"] == name]
        spread = f"median {statistics.median(seconds):.1f} s, at most {max(seconds):.1f} s"
        print(f"{name:16} {len(seconds)} x, from the fault to the next new step: {spread}")
    for name, found in (("from a detected loss to the next new step", again), ("from notice to saved state", kept)):
        if found:
            spread = f"median {statistics.median(found):.1f} s ({min(found):.1f} - {max(found):.1f})"
            print(f"{name}: {spread}, {len(found)} times")
    losses, weights = (max(deviation) for deviation in zip(*worst, strict=True))
    print(
        f"{len(hits)} of {options.faults} faults survived over {len(worst)} chains; "
        f"largest deviation of losses {losses:.1e}, of weights {weights:.1e}"
    )


if __name__ == "__main__":
    main()
