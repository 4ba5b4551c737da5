"""Shards become the right batches: found, counted, decoded once, mixed, and the same on any number of ranks."""

import io
import json
import logging
import multiprocessing
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

from raychain.data import members, shards
from raychain.data.addresses import expand
from raychain.data.cache import ShardCache
from raychain.data.decode import STORED_BEYOND_CROP, resize
from raychain.data.loader import Batch, Feed, Loader
from raychain.data.members import Wanted
from raychain.data.order import Order
from raychain.data.pictures import PictureReader
from raychain.data.shards import Shard, survey
from raychain.data.spec import Spec
from raychain.errors import InputError

SIZE, CONTEXT = 12, 4
WANTED = Wanted(("txt", "json.more"))
SPEC = Spec(WANTED, SIZE, "numbers")
BUDGET = 2**30


def numbers(texts: Sequence[str]) -> np.ndarray:
    """A tokeniser: the numbers in a caption, padded with -1."""
    rows = [[int(word) for word in text.split() if word.isdigit()][:CONTEXT] for text in texts]
    return np.array([row + [-1] * (CONTEXT - len(row)) for row in rows], dtype=np.int64)


READER = PictureReader(SPEC, numbers)


def encode(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(value: int, size: tuple[int, int] = (16, 16)) -> bytes:
    """A PNG of one grey."""
    return encode(Image.new("RGB", size, (value, value, value)))


def write(path: Path, samples: list[dict[str, Any]]) -> str:
    """A shard of samples {extension: content}, keyed 000, 001, …"""
    with webdataset.TarWriter(str(path)) as tar:
        for i, sample in enumerate(samples):
            tar.write({"__key__": f"{i:03}", **sample})
    return str(path)


def sample(number: int, captions: int = 3) -> dict[str, Any]:
    """Sample `number`: its grey and the first token of its captions are the number, the second counts the captions."""
    return {
        "png": plain(number),
        "txt": f"{number} 0",
        "json": {"more": [f"{number} {k}" for k in range(1, captions)]},
    }


@pytest.fixture
def three(tmp_path: Path) -> list[Shard]:
    """Shards of 7, 5 and 9 samples with numbers 0 … 20."""
    starts = (0, 7, 12, 21)
    paths = [
        write(tmp_path / f"{i}.tar", [sample(n) for n in range(starts[i], starts[i + 1])])
        for i in range(len(starts) - 1)
    ]
    return survey(paths, WANTED, tmp_path / "cache", "data.train")


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", BUDGET)


def feed(of: Sequence[Shard], per_image: int = 1, **options: Any) -> Feed:
    order = Order(tuple(s.samples for s in of), seed=3, window=2)
    reader = PictureReader(options.pop("spec", SPEC), options.pop("tokenize", numbers), per_image, **options)
    return Feed(tuple(of), order, reader)


def load(
    source: Feed, cache: ShardCache, *, batch: int = 6, start: int = 0, stop: int = 8, **options: Any
) -> list[Batch]:
    with Loader(source, cache, global_batch=batch, start=start, stop=stop, **options) as loader:
        return list(loader)


def same(a: Sequence[Batch], b: Sequence[Batch]) -> bool:
    return len(a) == len(b) and all(
        x.step == y.step and x.columns.keys() == y.columns.keys() and all(torch.equal(x[n], y[n]) for n in x.columns)
        for x, y in zip(a, b, strict=True)
    )


# Addresses


def test_braces_globs_folders_and_lists_name_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    names = ["a-00.tar", "a-01.tar", "a-02.tar", "b.tar", "sub/c.tar", "notes.txt"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    paths = {name: str(tmp_path / name) for name in names}

    def found(*patterns: str) -> list[str]:
        return expand([p if "://" in p else f"{tmp_path}/{p}" for p in patterns], "data.train")

    tars = [paths[name] for name in names[:4]]
    assert found("a-{00..01}.tar") == tars[:2]
    assert found("a-*.tar") == tars[:3]
    assert found("*.tar") == tars
    assert found("*/*.tar") == [paths["sub/c.tar"]]
    assert found("{a-0?,b}.tar") == tars
    assert found("") == tars
    assert found("b.tar", "a-{02,00}.tar") == [paths["b.tar"], paths["a-02.tar"], paths["a-00.tar"]]
    assert found(f"file://{tmp_path}/a-0*.tar") == [f"file://{path}" for path in tars[:3]]
    monkeypatch.chdir(tmp_path)
    assert expand(["b.tar", "sub"], "data.train") == [paths["b.tar"], paths["sub/c.tar"]], "addresses are absolute"


def test_other_filesystems_are_read_through_fsspec(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    path = write(tmp_path / "0.tar", [sample(n) for n in range(4)])
    memory.pipe("/bucket/x-0.tar", Path(path).read_bytes())
    found = expand(["memory://bucket/x-*.tar"], "data.train")
    assert found == expand(["memory://bucket/x-0.tar"], "data.train")
    [shard] = survey(found, WANTED, tmp_path / "cache", "data.train")
    assert shard.samples == 4
    assert len(ShardCache(tmp_path / "cache", BUDGET).table(shard, READER).label) == 4
    memory.pipe("/bucket/x-0.tar", Path(path).read_bytes())
    assert survey(found, WANTED, tmp_path / "cache", "data.train")[0].identity != shard.identity, "by its time stamp"


@pytest.mark.parametrize("pattern", ["none.tar", "a-{00..03}.tar", "x*.tar", "empty", "a-{00..01.tar", "no/x*.tar"])
def test_a_pattern_without_its_files_is_refused(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-00.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"^data\.train\n"):
        expand([f"{tmp_path}/{pattern}"], "data.train")


# Members and counts


def test_pictures_of_every_kind_and_captions_of_both_kinds_are_read(tmp_path: Path, cache: ShardCache) -> None:
    picture = Image.new("RGB", (20, 16), (200, 30, 90))
    path = write(
        tmp_path / "x.tar",
        [
            {"jpg": encode(picture, "jpeg"), "txt": "1"},
            {"jpeg": encode(picture.convert("L"), "jpeg"), "json": {"more": "2"}},
            {"png": encode(picture.convert("RGBA")), "txt": "3", "json": {"more": ["4", "5", "3", " ", 7]}},
            {"webp": encode(picture, "webp"), "json": {"more": None}, "txt": " 6\n"},
            {"PNG": encode(picture.quantize()), "txt": "7", "cls": b"3"},
            {"png": encode(picture), "cls": b"3"},
            {"txt": "8"},
        ],
    )
    [shard] = survey([path], WANTED, tmp_path / "cache", "data.train")
    assert shard.samples == 5
    table = cache.table(shard, READER)
    assert table.size == 5
    spans = zip(table.caption_offset, table.caption_offset[1:], strict=False)
    assert [table.tokens[a:b, 0].tolist() for a, b in spans] == [[1], [2], [3, 4, 5], [6], [7]]
    for row in (0, 2, 3, 4):
        assert np.abs(table.image(row).astype(int) - [200, 30, 90]).max() <= 12


def test_captions_come_from_nested_keys_in_order() -> None:
    content = {"txt": b"raw", "json": json.dumps({"a": {"b": ["x", "raw"]}, "c": "y", "n": 5, "d": {}}).encode()}
    assert members.captions(content, ("txt", "json.a.b", "json.c", "json.n", "json.d.e.f", "other")) == [
        "raw",
        "x",
        "y",
    ]
    assert members.captions(content, ("json.c", "txt")) == ["y", "raw"]


def test_class_labels_are_read_without_captions(tmp_path: Path, cache: ShardCache) -> None:
    wanted = Wanted(label=True)
    path = write(tmp_path / "x.tar", [{"png": plain(n), "cls": str(n).encode()} for n in (4, 2)] + [sample(1)])
    [shard] = survey([path], wanted, tmp_path / "cache", "evaluate.zero_shot")
    table = cache.table(shard, PictureReader(Spec(wanted, SIZE, ""), numbers))
    assert shard.samples == 2
    assert table.label.tolist() == [4, 2]
    assert table.tokens.shape[0] == 0


def test_counts_are_kept_for_every_kind_of_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", [sample(n) for n in range(4)] + [{"png": plain(1), "cls": b"1"}])
    args = tmp_path / "cache", "data.train"
    [first] = survey([path], WANTED, *args)
    [labels] = survey([path], Wanted(label=True), *args)
    assert (first.samples, labels.samples) == (4, 1)
    kept = [path for path in (tmp_path / "cache" / "counts").iterdir() if ".hash." not in path.name]
    assert len(kept) == 2
    kept_of_first = next(p for p in kept if WANTED.digest in p.name)
    kept_of_first.write_text('{"samples": 99, "bad": {"counts": {}, "examples": []}, "former": ""}')
    assert survey([path], WANTED, *args)[0].samples == 99, "the kept count is used"
    kept_of_first.write_text('{"samp')
    assert survey([path], WANTED, *args) == [first], "a torn file is counted again"
    moved = Path(path).rename(tmp_path / "y.tar")
    assert survey([str(moved)], WANTED, *args)[0].identity == first.identity


def test_files_that_are_no_shards_of_such_samples_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"text" * 1000)
    with pytest.raises(InputError, match="complete tar"):
        survey([str(tmp_path / "x.tar")], WANTED, tmp_path / "cache", "data.train")
    path = write(tmp_path / "y.tar", [{"png": plain(1), "text": "1"}])
    with pytest.raises(InputError, match=r"data\.captions\.keys"):
        survey([path], WANTED, tmp_path / "cache", "data.train")


def test_a_cache_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", [sample(1)])
    with pytest.raises(InputError, match=r"preload\.cache"):
        survey([path], WANTED, Path(path), "data.train")


# Decoding


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("shape", [(40, 40), (64, 64), (37, 91), (200, 41), (13, 13), (9, 30), (41, 40), (333, 500)])
def test_pixels_are_those_of_open_clips_evaluation(shape: tuple[int, int], mode: str) -> None:
    from open_clip.transform import image_transform

    pixels = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    content = encode(Image.fromarray(pixels).convert(mode))
    transform = image_transform(40, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    theirs = (transform(Image.open(io.BytesIO(content)).convert("RGB")) * 255).round().to(torch.uint8)
    difference = np.abs(resize(content, 40).astype(int) - theirs.permute(1, 2, 0).numpy())
    assert difference.max() <= 1, "torch rounds a few pixels differently from Pillow"
    assert difference.mean() < 0.02


def test_jpegs_decoded_at_reduced_size_stay_close_to_open_clips_pixels() -> None:
    """JPEG's draft mode saves most of the decoding; on a picture with fine detail it moves pixels by about a level."""
    from open_clip.transform import image_transform

    y, x = np.mgrid[0:480, 0:640]
    waves = [127 + 60 * np.sin(x / a) + 60 * np.cos(y / b) for a, b in ((17, 9), (5, 31), (40, 7))]
    content = encode(Image.fromarray(np.stack(waves, -1).astype(np.uint8)), "jpeg", quality=92)
    transform = image_transform(40, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    theirs = (transform(Image.open(io.BytesIO(content))) * 255).permute(1, 2, 0).numpy()
    difference = np.abs(resize(content, 40) - theirs)
    assert difference.mean() < 1.5
    assert difference.max() < 12


def test_whole_pictures_are_kept_for_random_crops() -> None:
    short = round(40 * STORED_BEYOND_CROP)
    assert resize(plain(1, (100, 200)), 40, whole=True).shape == (2 * short, short, 3)
    assert resize(plain(1, (30, 50)), 40, whole=True).shape == (50, 30, 3), "small pictures are not enlarged"


def test_an_unreadable_picture_is_skipped_with_a_warning_and_the_batch_is_full(
    tmp_path: Path, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    samples = [sample(n) for n in range(8)]
    samples[2]["png"] = b"no picture"
    samples[4]["png"] = samples[4]["png"][:40]
    samples[5] |= {"json": b"{", "txt": "5"}
    samples[6] |= {"json": {"more": []}, "txt": " "}
    found = survey([write(tmp_path / "x.tar", samples)], WANTED, tmp_path / "cache", "data.train")
    assert found[0].samples == 8
    with caplog.at_level(logging.WARNING, "raychain.data"):
        batches = load(feed(found), cache, batch=8, stop=2)
    assert [len(batch["images"]) for batch in batches] == [8, 8]
    assert set(torch.cat([b["images"] for b in batches]).unique().tolist()) <= {0, 1, 3, 7}
    [record] = caplog.records
    assert "x.tar: skipped 2 unreadable picture, 1 invalid text, 1 missing caption: 002 (" in record.getMessage()


# Cache


def test_cached_files_are_addressed_by_content_and_recipe(
    tmp_path: Path, cache: ShardCache, three: list[Shard]
) -> None:
    copy = tmp_path / "copy.tar"
    copy.write_bytes(Path(three[0].address).read_bytes())
    [moved] = survey([str(copy)], WANTED, tmp_path / "cache", "data.train")
    assert cache.path(moved, READER) == cache.path(three[0], READER)
    specs = [SPEC, Spec(WANTED, 16, "numbers"), Spec(WANTED, SIZE, "other"), Spec(WANTED, SIZE, "numbers", True)]
    specs.append(Spec(Wanted(("txt",)), SIZE, "numbers"))
    assert len({cache.path(shard, PictureReader(spec)) for shard in three for spec in specs}) == 15


def test_a_cached_shard_is_not_decoded_again(cache: ShardCache, three: list[Shard]) -> None:
    first = cache.table(three[0], READER)

    def refuse(texts: Sequence[str]) -> np.ndarray:
        raise AssertionError("tokenised again")

    second = cache.table(three[0], PictureReader(SPEC, refuse))
    assert [first.image(row)[0, 0, 0] for row in range(7)] == list(range(7))
    assert all(np.array_equal(first.image(row), second.image(row)) for row in range(7))
    np.testing.assert_array_equal(first.tokens, second.tokens)


def test_a_shard_beyond_the_budget_is_an_error_that_says_so(tmp_path: Path, three: list[Shard]) -> None:
    cache = ShardCache(tmp_path / "small", 1000)
    with pytest.raises(OSError, match=r"preload\.budget is 1000 bytes"):
        cache.table(three[0], READER)
    assert not list((tmp_path / "small" / "shards").glob("*.arrow"))


def test_a_cached_file_is_there_whole_or_not_at_all(cache: ShardCache, three: list[Shard]) -> None:
    def fail(texts: Sequence[str]) -> np.ndarray:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        cache.table(three[0], PictureReader(SPEC, fail))
    path = cache.path(three[0], READER)
    assert not path.exists()
    path.with_suffix(".tmp").write_bytes(b"half of it")  # left behind by a process that was killed
    assert cache.table(three[0], READER).size == 7
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".tmp"] == []


class Noting:
    """A slow tokeniser that notes each call in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        with self.path.open("a") as file:
            file.write("call\n")
        time.sleep(0.5)
        return numbers(texts)


def _read_together(start: Any, root: Path, shard: Shard, notes: Path) -> None:
    start.wait(60)
    assert ShardCache(root, BUDGET).table(shard, PictureReader(SPEC, Noting(notes))).size == 7


def test_two_processes_that_want_a_shard_at_once_decode_it_once(tmp_path: Path, three: list[Shard]) -> None:
    context = multiprocessing.get_context("spawn")
    start, notes = context.Barrier(2), tmp_path / "notes"
    processes = [
        context.Process(target=_read_together, args=(start, tmp_path / "both", three[0], notes)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert notes.read_text() == "call\n"


# Loader


def test_a_pass_of_batches_holds_each_sample_once_with_its_own_captions(cache: ShardCache, three: list[Shard]) -> None:
    batches = load(feed(three), cache, batch=7, stop=3)
    assert [batch.step for batch in batches] == [0, 1, 2]
    assert batches[0]["images"].shape == (7, SIZE, SIZE, 3)
    assert batches[0]["images"].dtype == torch.uint8
    assert batches[0]["tokens"].shape == (7, 1, CONTEXT)
    assert batches[0]["tokens"].dtype == torch.int64
    greys = torch.cat([batch["images"][:, 0, 0, 0] for batch in batches])
    assert sorted(greys.tolist()) == list(range(21))
    assert torch.equal(greys.long(), torch.cat([batch["tokens"][:, 0, 0] for batch in batches]))


def test_several_captions_are_the_pictures_own_and_hold_the_raw_one(cache: ShardCache, three: list[Shard]) -> None:
    drawn: set[int] = set()
    for batch in load(feed(three, per_image=2), cache, batch=7, stop=12):
        assert batch["tokens"].shape == (7, 2, CONTEXT)
        for grey, tokens in zip(batch["images"][:, 0, 0, 0].tolist(), batch["tokens"].tolist(), strict=True):
            assert [caption[0] for caption in tokens] == [grey, grey]
            first, second = (caption[1] for caption in tokens)
            assert first == 0
            drawn.add(second)
    assert drawn == {1, 2}


@pytest.mark.parametrize("crop", [None, (0.5, 1.0)])
def test_batches_are_the_same_every_time_and_for_any_threads(
    cache: ShardCache, three: list[Shard], crop: tuple[float, float] | None
) -> None:
    source = feed(three, 2, crop=crop, spec=Spec(WANTED, SIZE, "numbers", crop is not None))
    assert same(load(source, cache), load(source, cache, threads=3))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_joined_are_the_batch_of_one_rank_from_any_step_on(
    cache: ShardCache, three: list[Shard], world: int
) -> None:
    source = feed(three, per_image=2)
    whole = load(source, cache)
    for start in range(8):  # a rank's part may begin where a window or a pass ends
        parts = [load(source, cache, rank=rank, world=world, start=start) for rank in range(world)]
        joined = [
            Batch(p[0].step, {name: torch.cat([b[name] for b in p]) for name in p[0].columns})
            for p in zip(*parts, strict=True)
        ]
        assert same(joined, whole[start:])


def test_a_batch_larger_than_the_data_and_empty_shards_are_fine(tmp_path: Path, cache: ShardCache) -> None:
    paths = [write(tmp_path / "a.tar", [sample(1), sample(2)]), write(tmp_path / "b.tar", [{"txt": "no picture"}])]
    found = survey(paths, WANTED, tmp_path / "cache", "data.train")
    assert [shard.samples for shard in found] == [2, 0]
    for batch in load(feed(found), cache, batch=10, stop=3):
        assert sorted(batch["images"][:, 0, 0, 0].tolist()) == [1] * 5 + [2] * 5


def closes(loader: Loader, seconds: float = 3) -> bool:
    """Whether `close` returns in time."""
    thread = threading.Thread(target=loader.close, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


@pytest.mark.parametrize("taken", [0, 1, 6, 20])
def test_closing_never_hangs_wherever_the_consumer_stops(cache: ShardCache, three: list[Shard], taken: int) -> None:
    loader = Loader(feed(three), cache, global_batch=3, start=0, stop=20)
    batches: Iterator[Batch] = iter(loader)
    assert [next(batches).step for _ in range(taken)] == list(range(taken))
    assert closes(loader)
    assert closes(loader), "closing twice is fine"
    assert list(loader) == [], "a closed loader has no batches"


def test_closing_does_not_wait_for_shards_that_are_being_decoded(cache: ShardCache, three: list[Shard]) -> None:
    release = threading.Event()

    def stuck(texts: Sequence[str]) -> np.ndarray:
        release.wait(20)
        return numbers(texts)

    loader = Loader(feed(three, tokenize=stuck), cache, global_batch=3, start=0, stop=20)
    time.sleep(0.3)
    assert closes(loader)
    release.set()


def test_waiting_is_measured(cache: ShardCache, three: list[Shard]) -> None:
    def slow(texts: Sequence[str]) -> np.ndarray:
        time.sleep(0.2)
        return numbers(texts)

    with Loader(feed(three[:1], tokenize=slow), cache, global_batch=3, start=0, stop=2) as loader:
        assert len(list(loader)) == 2
    assert 0.1 < loader.wait_s < 5


def test_an_error_in_a_shard_reaches_the_consumer(cache: ShardCache, three: list[Shard]) -> None:
    path = Path(three[2].address)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(OSError, match=r"2\.tar"):
        load(feed(three), cache)


def test_a_shard_without_any_readable_sample_reaches_the_consumer(tmp_path: Path, cache: ShardCache) -> None:
    path = write(tmp_path / "x.tar", [{"png": b"?", "txt": "1"}])
    found = survey([path], WANTED, tmp_path / "cache", "data.train")
    with pytest.raises(OSError, match=r"x\.tar: none of its 1 samples can be used: 1 unreadable picture: 000"):
        load(feed(found), cache)


def test_read_gives_only_usable_samples_in_file_order(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", [sample(5), {"txt": "alone"}, sample(3)])
    [shard] = survey([path], WANTED, tmp_path / "cache", "data.train")
    assert [s["txt"] for s in shards.read(shard, WANTED)] == [b"5 0", b"3 0"]
