"""The order of samples of a very large data set on a large cluster, simulated: no picture is read.

    python experiments/benchmarks/order.py --out order.json

Finds 100,000 shards on a disk (empty files) by a pattern and by their index; plans a chain on so many shards of
10,000 samples; and reads the rows of every step of a pass for the ranks of some of the 64 nodes. Seconds are those of
the process on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import resource
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import numpy as np

from raychain.config.loading import validate
from raychain.core.dist import rank_slice
from raychain.core.storage import Folder
from raychain.data.addresses import expand
from raychain.data.index import FROM_INDEX, INDEX, CountedRecord, IndexedRecord, save
from raychain.data.lanes import parts, usual_lanes
from raychain.data.loader import lanes_of
from raychain.data.members import Wanted
from raychain.data.order import Order
from raychain.data.preload import Ranks, Source, wanted
from raychain.data.shards import Shard, survey
from raychain.records import TallyRecord
from raychain.runs.resolve import Reading, resolve_stages

MODELS = ("CoM-ViT-T-16", "CoM-ViT-S-16", "CoM-ViT-B-16", "CoM-ViT-L-16")


def surveyed(shards: int, samples: int) -> dict[str, Any]:
    """What it takes to expand a pattern, and to find counts and identities in an index."""
    format_ = Wanted(("txt",))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "counts").mkdir()
        entries = {}
        for i in range(shards):
            (path := folder / f"{i:05d}.tar").touch()
            stat = path.stat()
            version = f"{stat.st_ino}-0-{stat.st_mtime_ns}-{stat.st_ctime_ns}"
            counted = {format_.digest: CountedRecord(samples=samples, bad=TallyRecord(counts={}, examples=[]))}
            entries[path.name] = IndexedRecord(
                address=path.name, size=0, version=version, identity=f"{i:032x}", samples=counted
            )
        save(Folder(name), entries)
        size = (folder / INDEX).stat().st_size
        del entries
        started, wall = time.process_time(), time.monotonic()
        addresses = expand([f"{folder}/{{00000..{shards - 1:05d}}}.tar"], "shards")
        expanded = time.process_time() - started
        found = survey(addresses, format_, folder, "shards")
        assert len(found) == shards
        assert all(shard.source == FROM_INDEX and shard.samples == samples for shard in found)
        return {
            "expand_seconds": expanded,
            "survey_seconds": time.process_time() - started - expanded,
            "wall_seconds": time.monotonic() - wall,
            "index_mb": size / 1e6,
            "peak_gb": peak(),
        }


def planned(shards: int, samples: int, batch: int) -> tuple[Source, dict[str, Any]]:
    """The first stage's source, and what it took to plan a chain of four stages."""
    stages = [{"model": model, "epochs": 1} for model in MODELS]
    tree = {"name": "large", "data": {"train": "s3://bucket/{00000..99999}.tar"}, "chain": stages}
    experiment = validate(tree | {"train": {"global_batch": batch, "warmup": "1 %"}})
    memory, started = peak(), time.process_time()
    found = tuple(Shard(f"s3://bucket/{i:05d}.tar", 10**9 + i, f"{i:032x}", samples) for i in range(shards))
    counts = tuple(shard.samples for shard in found)
    order = Order(counts, 0, experiment.data.shuffle_window, lanes=usual_lanes(shards, sum(counts)))
    plan = resolve_stages(experiment, [Reading(found, order)] * len(stages), Folder("out"))
    order.lane(0)
    took = time.process_time() - started
    sent = len(pickle.dumps(plan))
    figures = {"seconds": took, "peak_gb": peak(), "of_which_before_gb": memory, "sent_to_a_worker_mb": sent / 1e6}
    return Source(plan[0].feed, batch), figures | {"lanes": order.lanes}


def peak() -> float:
    """The most memory that the process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def a_pass(source: Source, ranks: range, world: int) -> dict[str, Any]:
    """Milliseconds for a rank's rows of a step, over a pass, and the share of the shards that these ranks touch."""
    order, batch = source.feed.order, source.global_batch
    touched, took = np.zeros(len(order.counts), dtype=bool), []
    for rank in ranks:
        block = rank_slice(batch, rank, world)
        for step in range(-(-order.samples // batch)):
            started = time.thread_time()
            own = parts(order.lanes, step * batch, (step + 1) * batch, block)
            rows = [order.lane(part.lane).rows(part.start, part.stop) for part in own]
            took.append(time.thread_time() - started)
            for part in rows:
                touched[part.shard] = True
    return {"rows_ms": spread(took), "touched": float(touched.mean()), "lanes": lanes_of(order, batch, ranks, world)}


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 99th percentile and largest, in milliseconds."""
    values = np.array(seconds) * 1000
    return {"median": float(np.median(values)), "p99": float(np.quantile(values, 0.99)), "max": float(values.max())}


def whole_batches(source: Source, count: int) -> dict[str, float]:
    """Milliseconds for the rows of whole global batches, one after the other."""
    took = []
    for step in range(count):
        started = time.thread_time()
        source.feed.order.rows(step * source.global_batch, (step + 1) * source.global_batch)
        took.append(time.thread_time() - started)
    return spread(took)


def preloading(source: Source, ranks: range, world: int) -> float:
    """Milliseconds in which a preloader finds all that its node will want."""
    started = time.thread_time()
    list(wanted([source], 0, 1000, Ranks(ranks, world)))
    return 1000 * (time.thread_time() - started)


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=10_000, help="of a shard")
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=8, help="of a node")
    parser.add_argument("--batch", type=int, default=32_768)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    args = parser.parse_args()
    found = surveyed(args.shards, args.samples)
    source, plan = planned(args.shards, args.samples, args.batch)
    world = args.nodes * args.ranks
    results: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "numpy": np.__version__,
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "surveying": found,
        "planning": plan,
        "whole_batch_ms": whole_batches(source, 1000),
        "nodes": {},
    }
    for node in (0, args.nodes // 3, args.nodes - 1):
        ranks = range(node * args.ranks, (node + 1) * args.ranks)
        results["nodes"][node] = a_pass(source, ranks, world) | {"preloader_ms": preloading(source, ranks, world)}
    results["peak_gb"] = peak()
    print(json.dumps(results, indent=2))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
