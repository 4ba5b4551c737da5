"""The shards of a demo, and how one is written.

Training and retrieval shards have img2dataset's layout, zero-shot shards clip_benchmark's. `tarfile` writes them rather
than `webdataset.TarWriter`, because importing webdataset imports torch: two seconds in each process for a job of five.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Literal

from raychain.demo.captions import describe
from raychain.demo.compositions import Compositions, Recipe, Split
from raychain.demo.names import Name
from raychain.demo.pictures import Painter

TRAIN_SHARD, HELD_OUT_SHARD = 1000, 250  # samples; held-out shards are smaller so that several workers can share them
REPORT_EVERY = 100  # pictures


@dataclass(frozen=True)
class Arguments:
    """What decides every byte of a demo's shards, given the installed packages."""

    names: int
    pictures: int
    seed: int
    size: int
    held_out: int
    per_name: int

    def compositions(self) -> Compositions:
        return Compositions(self.names, self.seed, self.held_out)


@dataclass(frozen=True)
class Job:
    """One shard: samples `start` … `start + count` of a part of the demo. `path` is relative to the demo's folder."""

    part: Literal["captioned", "zero-shot"]
    split: Split
    shard: int
    start: int
    count: int
    path: str


def all_jobs(arguments: Arguments) -> list[Job]:
    """The shards of a demo, the large ones first."""
    drawn = arguments.compositions()
    jobs = _jobs("captioned", "train", arguments.pictures, TRAIN_SHARD, "train/{:05d}.tar")
    for split in ("validation", "test"):
        jobs += _jobs("captioned", split, len(drawn.retrieval(split)), HELD_OUT_SHARD, split + "/{:05d}.tar")
        wanted = arguments.names * arguments.per_name
        jobs += _jobs("zero-shot", split, wanted, HELD_OUT_SHARD, "zero_shot/" + split + "/test/{}.tar")
    return jobs


def write_shard(job: Job, arguments: Arguments, names: list[Name], painter: Painter, folder: Path) -> Iterator[int]:
    """Writes one shard under `folder`; yields how many pictures it drew since it last yielded."""
    rng = Random(f"{arguments.seed}/{job.path}")
    texts = [name.text for name in names]
    path = folder / job.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, recipe in enumerate(_recipes(job, arguments)):
            picture, scale = painter.paint(recipe, rng)
            if job.part == "zero-shot":
                _add(tar, f"s{job.start + place:07d}", {"cls": str(recipe.first), "jpg": picture})
            else:
                key = f"{job.shard:05d}{place:04d}"
                caption, about = _annotation(key, recipe, texts, scale, arguments.size, rng)
                _add(tar, key, {"jpg": picture, "json": about, "txt": caption})
            if (place + 1) % REPORT_EVERY == 0:
                yield REPORT_EVERY
    yield job.count % REPORT_EVERY


def _jobs(part: Literal["captioned", "zero-shot"], split: Split, total: int, each: int, path: str) -> list[Job]:
    starts = range(0, total, each)
    return [
        Job(part, split, shard, start, min(each, total - start), path.format(shard))
        for shard, start in enumerate(starts)
    ]


def _recipes(job: Job, arguments: Arguments) -> list[Recipe]:
    drawn = arguments.compositions()
    if job.split == "train":
        return drawn.train(job.start, job.count)
    if job.part == "zero-shot":
        return drawn.zero_shot(job.split, arguments.per_name)[job.start : job.start + job.count]
    return drawn.retrieval(job.split)[job.start : job.start + job.count]


def _annotation(key: str, recipe: Recipe, texts: list[str], scale: float, size: int, rng: Random) -> tuple[str, str]:
    """The sample's caption, and its json with the other captions and what they are about."""
    described = describe(recipe, texts, scale, rng)
    caption, *others = described.captions
    about = {
        "key": key,
        "caption": caption,
        "captions": others,
        "names": described.names,
        "relation": described.relation,
        "background": {"kind": recipe.kind, "colour": recipe.colour},
        "width": size,
        "height": size,
        "status": "success",
    }
    return caption, json.dumps(about, ensure_ascii=False)


def _add(tar: tarfile.TarFile, key: str, members: dict[str, str | bytes]) -> None:
    for suffix, content in members.items():
        data = content.encode() if isinstance(content, str) else content
        entry = tarfile.TarInfo(f"{key}.{suffix}")  # time and owner stay 0, so equal arguments give equal bytes
        entry.size = len(data)
        tar.addfile(entry, BytesIO(data))
