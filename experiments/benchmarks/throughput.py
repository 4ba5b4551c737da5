"""Images a second of whole training jobs: raychain, open_clip_train, and a plain DDP loop, on the same shards.

    python experiments/benchmarks/throughput.py --out throughput.json

Two workers of one thread each, fp32, AdamW, the same model, batch, pictures and crops, gathered features with gradient:

- compute: small pictures that any loader decodes in time (the demo's, 40 px) and a model that is slow in comparison;
- loader: photograph-like JPEGs of 350 to 500 px and a model that is faster than PIL.

They take turns. Every job trains the same epochs; a figure is the median of its log windows, without the first of an
epoch, which for webdataset loaders holds the filling of the shuffle buffer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import webdataset
from loader import make_shards

WORKERS, WINDOW = 2, 10
CROP = (0.9, 1.0)


class Job(NamedTuple):
    """What all three train."""

    model: str
    image_size: int
    batch: int
    epochs: int
    samples: int
    shards: str

    @property
    def steps(self) -> int:
        """Whole batches in an epoch, a multiple of the workers' loaders."""
        return self.samples // self.batch


def with_raychain(job: Job, scratch: Path) -> list[list[float]]:
    """Images/s of each window, by epoch."""
    import raychain
    from raychain.config.loading import validate

    tree = {
        "name": "throughput",
        "data": {
            "train": job.shards,
            "image_size": job.image_size,
            "crop": list(CROP),
            "captions": {"keys": ["txt"], "per_image": 1},
        },
        "chain": [{"model": job.model, "epochs": f"{job.steps * job.epochs} steps"}],
        "train": {"global_batch": job.batch, "warmup": "10 steps", "log_every": WINDOW, "precision": "fp32"},
        "compute": {"workers": WORKERS, "cpus_per_worker": 1},
        "preload": {"cache": str(scratch / "cache")},
        "storage": str(scratch / "runs"),
    }
    raychain.run(validate(tree))
    lines = (scratch / "runs/throughput/metrics.jsonl").read_text().splitlines()
    epochs: list[list[float]] = [[] for _ in range(job.epochs)]
    for line in map(json.loads, lines):
        epochs[min(int((line["step"] - 1) * job.batch / job.samples), job.epochs - 1)].append(line["samples_per_s"])
    return epochs


OPEN_CLIP = """from functools import partial
import torch
import open_clip_train.data as data
from open_clip_train.main import main
import raychain.models
# open_clip_train 3.3 names a device, which torch refuses for models on the CPU, and reads webdataset 1.0's marks
# between shards as samples.
wrap = torch.nn.parallel.DistributedDataParallel.__init__
torch.nn.parallel.DistributedDataParallel.__init__ = lambda self, model, device_ids, **rest: wrap(self, model, **rest)
data.tar_file_expander = partial(data.tar_file_expander, eof_value=None)
"""


def with_open_clip(job: Job, scratch: Path) -> list[list[float]]:
    """The same from open_clip_train's own log."""
    arguments = {
        "train-data": job.shards,
        "dataset-type": "webdataset",
        "train-num-samples": job.steps * job.batch,
        "model": job.model,
        "force-image-size": job.image_size,
        "batch-size": job.batch // WORKERS,
        "workers": 1,
        "epochs": job.epochs,
        "precision": "fp32",
        "device": "cpu",
        "warmup": 10,
        "lr": 1e-3,
        "log-every-n-steps": WINDOW,
        "logs": scratch / "logs",
        "name": "job",
        "save-frequency": 0,
    }
    flags = [f"--{name}={value}" for name, value in arguments.items()] + ["--local-loss", "--gather-with-grad"]
    # Flags lie in the script, as torchrun takes --logs for an abbreviation of its own options.
    (scratch / "train.py").write_text(f"{OPEN_CLIP}main({flags!r})\n")
    _torchrun([str(scratch / "train.py")], scratch / "open_clip.out")
    epochs: list[list[float]] = [[] for _ in range(job.epochs)]
    log = (scratch / "logs/job/out.log").read_text()
    for epoch, seconds in re.findall(r"Train Epoch: (\d+) .*Batch \(t\): ([\d.]+)", log):
        epochs[int(epoch)].append(job.batch / float(seconds))
    return epochs


def with_plain_ddp(job: Job, scratch: Path) -> list[list[float]]:
    """The same from the loop at the end of this file."""
    out = scratch / "plain.json"
    _torchrun([__file__, "--plain", json.dumps(job._asdict()), "--out", str(out)], scratch / "plain.out")
    found: list[list[float]] = json.loads(out.read_text())
    return found


SYSTEMS = {"raychain": with_raychain, "open_clip_train": with_open_clip, "plain DDP loop": with_plain_ddp}


def _torchrun(arguments: list[str], log: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={WORKERS}", *arguments]
    with log.open("w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if subprocess.run(command, env=environment, stdout=file, stderr=file).returncode:  # noqa: S603
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")


def plain(job: Job, out: Path) -> None:
    """A loop as one would write it: webdataset, PIL and torchvision, DDP, one process for loading a worker."""
    import open_clip
    from torch.distributed.nn.functional import all_gather

    import raychain.models  # noqa: F401 - registers the models

    dist.init_process_group("gloo")
    rank, share = dist.get_rank(), job.batch // WORKERS
    model, preprocess, _ = open_clip.create_model_and_transforms(
        job.model, force_image_size=job.image_size, aug_cfg={"scale": CROP}
    )
    tokenize = open_clip.get_tokenizer(job.model)
    pictures = (
        webdataset.WebDataset(
            job.shards, shardshuffle=100, nodesplitter=webdataset.split_by_node, empty_check=False, seed=0
        )
        .shuffle(1000)
        .decode("pilrgb")
        .to_tuple("jpg;png;webp", "txt")
        .map_tuple(preprocess, partial(_first, tokenize))
        .batched(share, partial=False)
        .repeat()
    )
    batches = iter(webdataset.WebLoader(pictures, batch_size=None, num_workers=1))
    trained = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    rates: list[list[float]] = [[] for _ in range(job.epochs)]
    for epoch in range(job.epochs):
        began = time.monotonic()
        for step in range(1, job.steps + 1):
            images, texts = next(batches)
            image, text, scale = trained(images, texts)
            images_all, texts_all = (torch.cat(all_gather(found)) for found in (image, text))
            labels = torch.arange(share) + rank * share
            loss = F.cross_entropy(scale * image @ texts_all.T, labels)
            loss = (loss + F.cross_entropy(scale * text @ images_all.T, labels)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % WINDOW == 0:
                rates[epoch].append(WINDOW * job.batch / (time.monotonic() - began))
                began = time.monotonic()
    if rank == 0:
        out.write_text(json.dumps(rates))
    dist.destroy_process_group()


def _first(tokenize: Any, text: str) -> torch.Tensor:
    return tokenize(text)[0]


def rates_of(epochs: list[list[float]]) -> dict[str, float]:
    """Medians of the first epoch and of the later ones."""
    first, *later = [windows[1:] for windows in epochs]
    return {"first": statistics.median(first), "later": statistics.median([rate for found in later for rate in found])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        plain(Job(**json.loads(options.plain)), options.out)
        return
    from raychain.demo import make_demo

    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        make_demo(data / "demo", pictures=4_000, held_out=100)  # whole shards: as many for each worker
        (data / "photographs").mkdir()
        photographs = make_shards(data / "photographs", 8, 256, seed=0)
        samples = sum(shard.samples for shard in photographs)
        last = max((data / "demo/train").glob("*.tar")).stem
        jobs = {
            "compute": Job("CoM-micro-M", 40, 128, 3, 4_000, f"{data}/demo/train/{{00000..{last}}}.tar"),
            "loader": Job("CoM-micro-S", 80, 64, 3, samples, f"{data}/photographs/{{00..07}}.tar"),
        }
        for bound, job in jobs.items():
            results[bound] = {system: [] for system in SYSTEMS}
            for repeat in range(options.repeats):
                for system, train in SYSTEMS.items():
                    with tempfile.TemporaryDirectory(dir=name) as scratch:
                        results[bound][system].append(rates_of(train(job, Path(scratch))))
                    said = results[bound][system][-1]
                    print(f"{bound} {repeat + 1}/{options.repeats} {system}: {said}", file=sys.stderr, flush=True)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    record = {"command": " ".join(sys.argv), "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine}
    options.out.write_text(json.dumps({**record, "images_per_s": results}, indent=1) + "\n")
    print("| | | first epoch | later epochs |\n|---|---|---|---|")
    for bound, found in results.items():
        for system, runs in found.items():
            cells = [f"{statistics.median(v):.0f} ({min(v):.0f} – {max(v):.0f})"
                     for v in ([run[key] for run in runs] for key in ("first", "later"))]  # fmt: skip
            print(f"| {bound}-bound | {system} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
