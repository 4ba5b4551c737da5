"""Every sample of shards read and every picture decoded in full, several shards at once in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

from PIL import Image

from raychain.core.json import Json
from raychain.data import members
from raychain.data.fetch import open_input
from raychain.data.health import DEEP, NO_CAPTION, Bad, Unusable, picture, tally
from raychain.data.members import Wanted
from raychain.data.pixels import check_range, is_deep, opened

SHARD = "unreadable shard"


@dataclass
class Checked:
    """What one shard holds; the counters map a number to how often it occurs."""

    address: str
    usable: int = 0
    bad: list[Bad] = field(default_factory=list)
    noted: list[Bad] = field(default_factory=list)
    """Samples that are used and worth a word."""
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    captions: Counter[int] = field(default_factory=Counter)


def check_shard(address: str, wanted: Wanted) -> Checked:
    """Reads a shard whole. What is wrong with it is in `bad`; nothing is raised for it."""
    found = Checked(address)
    try:
        with open_input(address) as file:
            for sample in members.samples(file, wanted, report=found.bad.append):
                try:
                    captions = members.annotation(sample, wanted).captions
                    width, height, deep = picture(_decoded, members.picture(sample))
                except Unusable as error:
                    found.bad.append(Bad(error.kind, sample["key"], error.detail))
                    continue
                if deep:
                    found.noted.append(Bad(DEEP, sample["key"], "scaled to 8 bits for training"))
                found.usable += 1
                found.widths[width] += 1
                found.heights[height] += 1
                found.captions[len(captions)] += 1
    except OSError as error:
        found.bad.append(Bad(SHARD, "", str(error)))
    return found


def check_shards(addresses: Sequence[str], wanted: Wanted, workers: int) -> Iterator[Checked]:
    """Each shard's findings as they come, from `workers` processes at most; one worker is this process."""
    if min(workers, len(addresses)) == 1:
        yield from (check_shard(address, wanted) for address in addresses)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of pyarrow's filesystems
    interrupt = (signal.SIGINT, signal.SIG_DFL)  # an interrupt at the terminal ends them without a traceback each
    with ProcessPoolExecutor(
        min(workers, len(addresses)), mp_context=context, initializer=signal.signal, initargs=interrupt
    ) as pool:
        futures: list[Future[Checked]] = [pool.submit(check_shard, address, wanted) for address in addresses]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def default_workers() -> int:
    """A process for each core."""
    return os.cpu_count() or 1


def summary(found: Sequence[Checked]) -> Json:
    """The findings together: `shards`, `samples`, `usable`, `bad` (kind → count), `bad_fraction`, `missing_captions`,
    `width`, `height` (pixels) and `captions` (a picture) as {min, median, max}, and every bad sample in `bad_samples`;
    `noted` and `noted_samples` are of those that are used and worth a word.
    """
    bad = [(shard.address, item) for shard in found for item in shard.bad]
    noted = [(shard.address, item) for shard in found for item in shard.noted]
    usable = sum(shard.usable for shard in found)
    counts = tally(item for _, item in bad).counts
    samples = usable + len(bad)
    return {
        "shards": len(found),
        "samples": samples,
        "usable": usable,
        "bad": dict(sorted(counts.items())),
        "bad_fraction": len(bad) / samples if samples else 1.0,
        "missing_captions": counts.get(NO_CAPTION, 0),
        "width": spread(sum((shard.widths for shard in found), Counter[int]())),
        "height": spread(sum((shard.heights for shard in found), Counter[int]())),
        "captions": spread(sum((shard.captions for shard in found), Counter[int]())),
        "bad_samples": [{"shard": address, **item._asdict()} for address, item in bad],
        "noted": tally(item for _, item in noted).counts,
        "noted_samples": [{"shard": address, **item._asdict()} for address, item in noted],
    }


def spread(counts: Counter[int]) -> dict[str, int] | None:
    """Smallest, median (the lower of two) and largest of numbers given as {number: how often}; None without any."""
    half, ordered = (counts.total() + 1) // 2, sorted(counts)
    for number in ordered:
        half -= counts[number]
        if half <= 0:
            return {"min": ordered[0], "median": number, "max": ordered[-1]}
    return None


def _decoded(encoded: bytes) -> tuple[int, int, bool]:
    """Width, height, and whether it has one channel of more than 8 bits. Raises as decoding for a run does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, and within Pillow's limit
        image = opened(encoded)
    check_range(image)
    image.load()
    return *image.size, is_deep(image)
