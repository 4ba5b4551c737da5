"""Images a second of one core: raychain's loader against others on the same pictures.

    python experiments/benchmarks/loader.py --out loader.json

The others are webdataset + PIL + torchvision and, where they are installed, mosaicml-streaming (on the same bytes as
MDS) and NVIDIA DALI's CPU path. Shards of photograph-like JPEGs are made first (seeded). Every pipeline gives batches
of 224-pixel pictures with token ids in one thread; they take turns, and every figure is a median over the repetitions.
Speed is by the processor time of the whole process, which other programs disturb little; wall time stands beside it.
The others keep nothing decoded: what they do in the first epoch they do in each.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import numpy as np
import torch
import torchvision.transforms as T
import webdataset
from other_loaders import dali, has_dali, has_streaming, recipe, streamed, write_mds
from PIL import Image

from raychain.data import pictures, table
from raychain.data.cache import ShardCache
from raychain.data.loader import Feed, Loader
from raychain.data.members import Wanted
from raychain.data.order import Order
from raychain.data.pictures import PictureReader
from raychain.data.shards import Shard, survey
from raychain.data.spec import Representation, Spec

SIZE, BATCH, CONTEXT = 224, 64, 77
CROP = (0.9, 1.0)
WANTED = Wanted(("txt",))
BICUBIC, BILINEAR = T.InterpolationMode.BICUBIC, T.InterpolationMode.BILINEAR


def photograph(rng: np.random.Generator) -> Image.Image:
    """A picture with a photograph's statistics: 1/f noise in luminance and, smoother, in colour, gradients, edges of a
    few flat shapes, and sensor noise. Shorter side 350 to 500 pixels."""
    short = int(rng.integers(350, 501))
    long = int(short * rng.uniform(1, 1.6))
    h, w = (short, long) if rng.random() < 0.6 else (long, short)
    spectrum = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None])
    spectrum[0, 0] = 1

    def cloud(slope: float) -> np.ndarray:
        waves = rng.normal(size=(h, w // 2 + 1)) + 1j * rng.normal(size=(h, w // 2 + 1))
        field = np.fft.irfft2(waves / spectrum**slope, s=(h, w))
        return (field - field.mean()) / field.std()

    y, x = np.mgrid[0 : 1 : h * 1j, 0 : 1 : w * 1j]
    light = 128 + 36 * cloud(1.45) + 40 * (rng.uniform(-1, 1) * x + rng.uniform(-1, 1) * y)
    colour = [16 * cloud(1.8) for _ in range(2)]
    for _ in range(4):
        cy, cx, ry, rx = rng.uniform(0.1, 0.9, 2).tolist() + rng.uniform(0.05, 0.3, 2).tolist()
        light += rng.uniform(-50, 50) * (((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1)
    rgb = np.stack([light + colour[0], light - 0.5 * (colour[0] + colour[1]), light + colour[1]], -1)
    return Image.fromarray(np.clip(rgb + rng.normal(0, 1.5, rgb.shape), 0, 255).astype(np.uint8))


def make_shards(folder: Path, shards: int, samples: int, seed: int) -> list[Shard]:
    """Shards of JPEGs of quality 90 with one caption each."""
    rng = np.random.default_rng(seed)
    paths = [f"{folder}/{i:02}.tar" for i in range(shards)]
    for i, path in enumerate(paths):
        with webdataset.TarWriter(path) as tar:
            for j in range(samples):
                picture = io.BytesIO()
                photograph(rng).save(picture, "jpeg", quality=90)
                tar.write({"__key__": f"{i:02}{j:05}", "jpg": picture.getvalue(), "txt": f"a photograph {i} {j}"})
    return survey(paths, WANTED, folder / "counts", "shards")


def tokenize(texts: Sequence[str]) -> np.ndarray:
    """Bytes of the captions, padded: next to no time, the same in every pipeline."""
    ids = np.zeros((len(texts), CONTEXT), np.int64)
    for row, text in zip(ids, texts, strict=True):
        content = text.encode()[:CONTEXT]
        row[: len(content)] = list(content)
    return ids


def baseline(shards: Sequence[Shard], crop: bool, mode: T.InterpolationMode) -> Iterator[torch.Tensor]:
    """Batches as webdataset's own recipes make them: PIL decodes, torchvision crops and converts to float."""
    picture = recipe(SIZE, CROP if crop else None, mode)
    source = webdataset.WebDataset([s.address for s in shards], shardshuffle=False, empty_check=False)
    samples = source.decode("pil").to_tuple("jpg", "txt").map_tuple(picture, lambda text: tokenize([text])[0])
    for images, _ in samples.batched(BATCH, partial=False):
        yield images


def loaded(
    shards: Sequence[Shard], folder: Path, crop: bool, pixels: Representation, epochs: int, on_device: bool = False
) -> Iterator[torch.Tensor]:
    """Batches of raychain's loader out of the cache in `folder`, made there in the first epoch; with `on_device` what
    a GPU would be sent, which resizes them (`data.augment_on`)."""
    order = Order(tuple(s.samples for s in shards), seed=0, window=2)
    spec = Spec(WANTED, SIZE, "bytes", crop, pixels)
    cache, steps = ShardCache(folder, 2**40), epochs * order.samples // BATCH
    feed = Feed(tuple(shards), order, PictureReader(spec, tokenize, 1, CROP if crop else None, on_device))
    with Loader(feed, cache, global_batch=BATCH, start=0, stop=steps) as loader:
        for batch in loader:
            yield batch["window" if on_device else "images"]


def timed(batches: Iterator[torch.Tensor]) -> dict[str, float]:
    """Images a second by processor and by wall time, and seconds to the first batch."""
    cpu, wall, first, images = time.process_time(), time.perf_counter(), 0.0, 0
    for batch in batches:
        first = first or time.perf_counter() - wall
        images += len(batch)
    return {
        "per_cpu_s": images / (time.process_time() - cpu),
        "per_wall_s": images / (time.perf_counter() - wall),
        "first_batch_s": first,
    }


def pipelines(shards: Sequence[Shard], work: Path, crop: bool, epochs: int) -> dict[str, Callable[[], Any]]:
    """What is measured, by name; each run of one is a fresh start."""

    def cold(pixels: Representation) -> Iterator[torch.Tensor]:
        shutil.rmtree(work / f"cold-{pixels}", ignore_errors=True)
        yield from loaded(shards, work / f"cold-{pixels}", crop, pixels, 1)

    others: dict[str, Callable[[], Any]] = {
        "webdataset, bicubic": lambda: baseline(shards, crop, BICUBIC),
        "webdataset, bilinear": lambda: baseline(shards, crop, BILINEAR),
    }
    area, addresses = CROP if crop else None, [shard.address for shard in shards]
    if has_streaming():
        if not (mds := work.parent / "mds").exists():
            write_mds(addresses, mds)
        others["streaming, bicubic"] = lambda: streamed(mds, BATCH, SIZE, area, tokenize)
    if has_dali():
        samples = sum(shard.samples for shard in shards)
        others["DALI on CPU, cubic"] = lambda: dali(addresses, samples, BATCH, SIZE, area, tokenize)
    own: dict[str, Callable[[], Any]] = {
        "raychain, first epoch, raw": lambda: cold("raw"),
        "raychain, first epoch, JPEG": lambda: cold("jpeg"),
        "raychain, cached, raw": lambda: loaded(shards, work / "cold-raw", crop, "raw", epochs),
        "raychain, cached, JPEG": lambda: loaded(shards, work / "cold-jpeg", crop, "jpeg", epochs),
    }
    if crop:
        own |= {
            "raychain, raw, GPU resizes": lambda: loaded(shards, work / "cold-raw", crop, "raw", epochs, True),
            "raychain, JPEG, GPU resizes": lambda: loaded(shards, work / "cold-jpeg", crop, "jpeg", epochs, True),
        }
    return others | own


def parts(batches: Iterator[torch.Tensor]) -> dict[str, float]:
    """Microseconds of processor time a picture of raychain's random crops: all, and those spent in two functions."""
    spent: dict[str, list[float]] = {"resizing": [], "decoding JPEG": []}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            before = time.thread_time()
            found = function(*given)
            spent[name].append(time.thread_time() - before)
            return found

        return call

    resize, from_jpeg = pictures.scale_into, table.from_jpeg
    pictures.scale_into, table.from_jpeg = watched("resizing", resize), watched("decoding JPEG", from_jpeg)
    try:
        before = time.process_time()
        images = sum(len(batch) for batch in batches)
        spent["all"] = [time.process_time() - before]
    finally:
        pictures.scale_into, table.from_jpeg = resize, from_jpeg
    return {name: round(sum(seconds) / images * 1e6, 1) for name, seconds in spent.items()}


def tolerance(shard: Shard, work: Path) -> dict[str, dict[str, float]]:
    """Difference of raychain's centre crops from the bicubic baseline's, in levels of 255."""
    theirs = torch.cat(list(baseline([shard], False, BICUBIC))).mul(255).round().permute(0, 2, 3, 1).numpy()
    found = {}
    for pixels in ("raw", "jpeg"):
        table = ShardCache(work, 2**40).table(
            shard, PictureReader(Spec(WANTED, SIZE, "bytes", False, pixels), tokenize)
        )
        difference = np.abs(np.stack([table.image(row) for row in range(len(theirs))]) - theirs)
        found[pixels] = {"mean": round(float(difference.mean()), 4), "max": float(difference.max())}
    return found


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All results."""
    shards = make_shards(work, args.shards, args.samples, args.seed)
    samples = sum(shard.samples for shard in shards)
    results: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}",
        "kB_a_picture": round(sum(shard.size for shard in shards) / samples / 1000, 1),
        "difference": tolerance(shards[0], work / "tolerance"),
    }
    for task, crop in (("centre", False), ("crop", True)):
        if task not in args.tasks:
            continue
        runs: dict[str, list[dict[str, float]]] = {}
        for _ in range(args.repeats):
            for name, start in pipelines(shards, work / task, crop, args.epochs).items():
                runs.setdefault(name, []).append(timed(start()))
        results[task] = {name: summary(found, runs["webdataset, bicubic"]) for name, found in runs.items()}
        if crop:
            results["parts"] = {
                pixels: parts(loaded(shards, work / task / f"cold-{pixels}", crop, pixels, args.epochs))
                for pixels in ("raw", "jpeg")
            }
    return results


def summary(found: list[dict[str, float]], reference: list[dict[str, float]]) -> dict[str, float]:
    """Medians, the spread of the speed (largest less smallest, of the median), and the ratio to the reference."""
    speeds = [run["per_cpu_s"] for run in found]
    median = {key: statistics.median(run[key] for run in found) for key in found[0]}
    ratio = median["per_cpu_s"] / statistics.median(run["per_cpu_s"] for run in reference)
    spread = 100 * (max(speeds) - min(speeds)) / median["per_cpu_s"]
    return {k: round(v, 3) for k, v in {**median, "ratio": ratio, "spread_percent": spread}.items()}


def main() -> None:
    """Measures, prints the table and a JSON line, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--samples", type=int, default=256, help="of a shard")
    parser.add_argument("--epochs", type=int, default=5, help="of a cached run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=("centre", "crop"), default=["centre", "crop"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="raychain-loader-") as work:
        results = measure(args, Path(work))
    print(f"pictures of {results['kB_a_picture']} kB; difference from PIL + torchvision: {results['difference']}")
    for task in args.tasks:
        print(f"{task:30}{'images/CPU s':>14}{'spread %':>10}{'ratio':>8}{'images/s':>11}{'first batch s':>15}")
        for name, row in results[task].items():
            print(
                f"{name:30}{row['per_cpu_s']:14.0f}{row['spread_percent']:10.1f}{row['ratio']:8.2f}"
                f"{row['per_wall_s']:11.0f}{row['first_batch_s']:15.3f}"
            )
    for pixels, found in results.get("parts", {}).items():
        print(f"cached, {pixels}, random crops, µs of processor time a picture: {found}")
    print(json.dumps(results))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
