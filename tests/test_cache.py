"""The cache serves no wrong byte and never exceeds its budget, whoever shares it, is killed or damages its files."""

import contextlib
import io
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from raychain.data import cache as caching
from raychain.data.cache import ShardCache
from raychain.data.loader import Feed, Loader
from raychain.data.members import Wanted
from raychain.data.order import Order
from raychain.data.pictures import PictureReader
from raychain.data.room import claim
from raychain.data.shards import Shard, survey
from raychain.data.spec import RAW_BYTES, Spec, fitting, representation

SIZE, SAMPLES, SHARDS = 32, 20, 12
WANTED = Wanted(("txt",))
SPEC = Spec(WANTED, SIZE, "numbers")
FILE = 70_000
"""More than one shard's file, less than a half more."""


def numbers(texts: Sequence[str]) -> np.ndarray:
    """A tokeniser: the caption's number."""
    return np.array([[int(text)] for text in texts])


READER = PictureReader(SPEC, numbers)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    """Twelve shards of 20 samples; sample n is a picture of grey n with the caption n."""
    root = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        with webdataset.TarWriter(f"{root}/{shard:02}.tar") as tar:
            for number in range(shard * SAMPLES, (shard + 1) * SAMPLES):
                picture = io.BytesIO()
                Image.new("RGB", (40, 40), (number, number, number)).save(picture, "png")
                tar.write({"__key__": f"{number:03}", "png": picture.getvalue(), "txt": str(number)})
    return survey([f"{root}/{shard:02}.tar" for shard in range(SHARDS)], WANTED, root / "counts", "data.train")


def right(table: Any, shard: int) -> bool:
    """Whether the table holds the shard's own samples."""
    expected = list(range(shard * SAMPLES, (shard + 1) * SAMPLES))
    greys = [int(table.image(row).min()) for row in range(table.size)]
    return (
        greys == [int(table.image(row).max()) for row in range(table.size)] == table.tokens[:, 0].tolist() == expected
    )


def listed(root: Path) -> dict[tuple[str, int], int]:
    """Bytes of each file under a folder, by name and inode."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                stat = Path(folder, name).stat()
                found[name, stat.st_ino] = stat.st_size
    return found


def held(root: Path) -> int:
    """Bytes of all files under a folder; looked at until nothing changed between two looks."""
    while (found := listed(root)) != listed(root):
        continue
    return sum(found.values())


def files(cache: ShardCache) -> set[str]:
    return {path.name for path in (cache.root / "shards").iterdir()}


# Damage


def test_a_flipped_bit_anywhere_is_found_and_the_file_made_again(
    tmp_path: Path, found: list[Shard], caplog: pytest.LogCaptureFixture
) -> None:
    ShardCache(tmp_path, 10 * FILE).table(found[3], READER)
    path, draw = ShardCache(tmp_path, 10 * FILE).path(found[3], READER), random.Random(0)
    size = path.stat().st_size
    places = [0, 3, 7, 9, size - 1, size - 7, *(draw.randrange(size) for _ in range(60)), *range(200, 1500, 50)]
    for count, place in enumerate(places, 1):
        content = bytearray(path.read_bytes())
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        assert right(ShardCache(tmp_path, 10 * FILE).table(found[3], READER), 3), place
        assert len([r for r in caplog.records if "is damaged" in r.getMessage()]) == count
        assert path.stat().st_size == size
        assert len(list(path.parent.iterdir())) == 1, "the damaged file is gone"


def test_truncated_and_foreign_files_are_made_again(tmp_path: Path, found: list[Shard]) -> None:
    cache = ShardCache(tmp_path, 10 * FILE)
    cache.table(found[0], READER)
    cache.table(found[1], READER)
    path, other = cache.path(found[0], READER), cache.path(found[1], READER).read_bytes()
    whole = path.read_bytes()
    for content in (b"", b"x", whole[:100], whole[: len(whole) // 2], whole[:-1], whole + b"\0", other, b"\0" * 70_000):
        path.write_bytes(content)
        assert right(ShardCache(tmp_path, 10 * FILE).table(found[0], READER), 0)
        assert path.read_bytes() == whole


def test_a_file_is_verified_once_a_process(tmp_path: Path, found: list[Shard], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, verified = ShardCache(tmp_path, 10 * FILE), []
    monkeypatch.setattr(caching, "verify", verified.append)
    for _ in range(3):
        cache.table(found[0], READER)
    assert len(verified) == 1


# Budget


def test_the_least_recently_used_files_that_nobody_holds_make_room(tmp_path: Path, found: list[Shard]) -> None:
    cache = ShardCache(tmp_path, 3 * FILE)
    for shard in (0, 1, 2, 0):
        cache.table(found[shard], READER)
        time.sleep(0.02)  # file systems keep times in ticks of milliseconds
    table = cache.table(found[1], READER)
    time.sleep(0.02)
    cache.table(found[0], READER)
    cache.table(found[3], READER)
    assert files(cache) == {cache.path(found[i], READER).name for i in (0, 1, 3)}, "2 was used last before 0 and 1"
    cache.table(found[4], READER)
    assert files(cache) == {cache.path(found[i], READER).name for i in (1, 3, 4)}, "1 is the oldest, but held"
    image = table.image(5)
    del table
    assert claim(cache.path(found[1], READER)) is None, "a view holds the file, too"
    assert image[0, 0, 0] == SAMPLES + 5


def test_a_shard_waits_until_others_let_go_and_else_is_decoded_into_memory(
    tmp_path: Path, found: list[Shard], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(tmp_path, FILE)
    tables = [cache.table(found[0], READER)]
    threading.Timer(0.5, tables.clear).start()
    started = time.monotonic()
    assert cache.table(found[1], READER).mapped
    assert time.monotonic() - started > 0.3
    tables.append(cache.table(found[2], READER))
    monkeypatch.setattr(caching, "PATIENCE_S", 0.2)
    table = cache.table(found[3], READER)
    assert right(table, 3)
    assert not table.mapped
    assert "preload.budget" in caplog.text
    assert held(tmp_path) <= FILE


def test_ensure_makes_files_but_not_at_the_cost_of_recent_ones(tmp_path: Path, found: list[Shard]) -> None:
    cache = ShardCache(tmp_path, 2 * FILE)
    written = cache.ensure(found[0], READER)
    assert written == cache.path(found[0], READER).stat().st_size
    assert cache.ensure(found[0], READER) == 0
    start = time.time()
    time.sleep(0.02)
    assert cache.ensure(found[1], READER, spare=start)
    assert cache.ensure(found[2], READER, spare=start), "0 was used before the start"
    assert cache.ensure(found[3], READER, spare=start) == 0
    assert files(cache) == {cache.path(found[i], READER).name for i in (1, 2)}
    assert cache.ensure(found[3], READER)
    tables = [cache.table(found[i], READER) for i in (2, 3)]
    assert cache.ensure(found[4], READER) == 0, "all is held"
    assert [table.size for table in tables] == [SAMPLES, SAMPLES]


def test_a_window_beyond_the_budget_is_an_error_that_names_it(tmp_path: Path, found: list[Shard]) -> None:
    cache = ShardCache(tmp_path, 3 * FILE)
    feed = Feed(tuple(found), Order((SAMPLES,) * SHARDS, 0, window=4), READER)
    with (
        pytest.raises(OSError, match=r"preload\.budget is 210000 bytes; the 4 shards that are shuffled together"),
        Loader(feed, cache, global_batch=16, start=0, stop=9) as loader,
    ):
        list(loader)


def _train(root: Path, found: list[Shard], seed: int, rank: int, world: int, budget: int, results: Any) -> None:
    torch.set_num_threads(1)
    feed = Feed(tuple(found), Order((SAMPLES,) * SHARDS, seed, window=3), READER)
    cache = ShardCache(root, budget)
    seen = []
    with Loader(feed, cache, global_batch=48, start=0, stop=20, rank=rank, world=world, threads=2) as loader:
        for batch in loader:
            assert torch.equal(batch["images"][:, 3, 3, 0].long(), batch["tokens"][:, 0, 0])
            seen += batch["tokens"][:, 0, 0].tolist()
    results.put((seed, rank, seen))


def test_three_processes_share_a_quarter_of_the_data_and_never_exceed_it(tmp_path: Path, found: list[Shard]) -> None:
    """Two ranks of a run and a second run with another order, on a budget of one window and little more."""
    context, budget = multiprocessing.get_context("spawn"), int(3.3 * FILE)
    results, over, stop = context.Queue(), [], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            if (size := held(tmp_path)) > budget:
                over.append(size)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    places = ((0, 0, 2), (0, 1, 2), (1, 0, 1))
    processes = [context.Process(target=_train, args=(tmp_path, found, *p, budget, results)) for p in places]
    for process in processes:
        process.start()
    parts = {(seed, rank): seen for seed, rank, seen in (results.get(timeout=240) for _ in processes)}
    for process in processes:
        process.join(60)
    stop.set()
    watcher.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert over == []
    everything = sorted(list(range(SHARDS * SAMPLES)) * 4)
    assert sorted(parts[0, 0] + parts[0, 1]) == everything
    assert sorted(parts[1, 0]) == everything


def test_an_idle_loader_holds_nothing(tmp_path: Path, found: list[Shard]) -> None:
    cache = ShardCache(tmp_path, 3 * FILE)
    feed = Feed(tuple(found), Order((SAMPLES,) * SHARDS, 0, window=3), READER)
    with Loader(feed, cache, global_batch=4, start=0, stop=60) as loader:
        batches = iter(loader)
        first = next(batches)
        started = time.monotonic()
        tables = [cache.table(shard, READER) for shard in found[:3]]
        assert all(table.mapped for table in tables)
        assert time.monotonic() - started < caching.PATIENCE_S / 2
        del tables
        greys = [first["tokens"][:, 0, 0], *(batch["tokens"][:, 0, 0] for batch in batches)]
    assert sorted(torch.cat(greys).tolist()) == list(range(SHARDS * SAMPLES))


# Crashes


def _stuck(root: Path, shard: Shard, reached: Any) -> None:
    def tokenize(texts: Sequence[str]) -> np.ndarray:
        reached.set()
        time.sleep(600)
        return numbers(texts)

    ShardCache(root, 2 * FILE).table(shard, PictureReader(SPEC, tokenize))


def test_what_a_killed_process_left_blocks_nobody_and_is_cleared(tmp_path: Path, found: list[Shard]) -> None:
    context = multiprocessing.get_context("spawn")
    reached = context.Event()
    process = context.Process(target=_stuck, args=(tmp_path, found[0], reached))
    process.start()
    assert reached.wait(120)
    assert process.pid
    cache = ShardCache(tmp_path, 2 * FILE)
    scratch = cache.path(found[0], READER).with_suffix(".tmp")
    assert claim(scratch) is None, "a live maker holds its file"
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert scratch.stat().st_size > 50_000
    for shard in (1, 2, 3):
        cache.table(found[shard], READER)
        assert held(tmp_path) <= 2 * FILE
    assert not scratch.exists()
    scratch.write_bytes(b"half of it")
    assert right(cache.table(found[0], READER), 0)
    assert not scratch.exists()


# Representation


@pytest.mark.parametrize(("samples", "budget", "expected"), [(10, 1000, "raw"), (11, 1000, "jpeg"), (0, 1, "raw")])
def test_pixels_are_kept_raw_where_all_of_them_fit(samples: int, budget: int, expected: str) -> None:
    assert representation(samples, 100, budget) == expected


def test_the_representation_follows_the_data_or_the_user_and_is_part_of_the_address() -> None:
    fit = RAW_BYTES // (3 * SIZE**2)
    raw, jpeg = (fitting(SPEC, samples, None) for samples in (fit, fit + 1))
    assert (fitting(SPEC, fit + 1, "raw"), fitting(SPEC, 1, "jpeg")) == (raw, jpeg)
    assert raw == SPEC
    assert jpeg.pixels == "jpeg"
    assert jpeg.digest != raw.digest


def test_pictures_kept_as_jpeg_stay_close_and_take_less(tmp_path: Path) -> None:
    y, x = np.mgrid[0:300, 0:400]
    waves = np.stack([127 + 60 * np.sin(x / a) + 60 * np.cos(y / b) for a, b in ((27, 19), (35, 31), (40, 37))], -1)
    picture = io.BytesIO()
    Image.fromarray(waves.astype(np.uint8)).save(picture, "png")
    with webdataset.TarWriter(f"{tmp_path}/x.tar") as tar:
        for key in ("0", "1", "2"):
            tar.write({"__key__": key, "png": picture.getvalue(), "txt": key})
    [shard] = survey([f"{tmp_path}/x.tar"], WANTED, tmp_path / "cache", "data.train")
    cache, size = ShardCache(tmp_path / "cache", 2**24), 128
    raw, jpeg = (
        cache.table(shard, PictureReader(Spec(WANTED, size, "numbers", False, p), numbers)) for p in ("raw", "jpeg")
    )
    difference = np.abs(raw.image(2).astype(int) - jpeg.image(2))
    assert difference.mean() < 1
    assert jpeg.image(0).shape == (size, size, 3)
    assert raw._content.size > 4 * jpeg._content.size
    for crop in (None, (0.5, 1.0)):
        spec = Spec(WANTED, size, "numbers", crop is not None, "jpeg")
        feed = Feed((shard,), Order((3,), 0), PictureReader(spec, numbers, 1, crop))
        runs = [list(_batches(feed, cache, threads)) for threads in (1, 3)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def _batches(feed: Feed, cache: ShardCache, threads: int) -> Iterator[torch.Tensor]:
    with Loader(feed, cache, global_batch=4, start=0, stop=3, threads=threads) as loader:
        for batch in loader:
            yield batch["images"]
