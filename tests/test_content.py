"""A shard is its content: whatever was changed is noticed, whatever was only moved is not, and little is read twice."""

from __future__ import annotations

import io
import logging
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raychain.core.storage import Folder, resolve
from raychain.data import content
from raychain.data.cache import ShardCache
from raychain.data.content import ChangedError, identify
from raychain.data.members import Wanted
from raychain.data.pictures import PictureReader
from raychain.data.shards import Shard, survey
from raychain.data.spec import Spec
from raychain.errors import InputError

WANTED = Wanted(("txt",))
SPEC = Spec(WANTED, 16, "lengths")
SAMPLES = 60


def lengths(texts: Sequence[str]) -> np.ndarray:
    return np.array([[int(text.split()[0])] for text in texts])


def write(path: Path, first: int = 100) -> Path:
    """300 KB; the captions are the numbers from `first` on."""
    noise = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(noise, "png")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for n in range(SAMPLES):
            for name, data in ((f"{n:04}.png", noise.getvalue()), (f"{n:04}.txt", f"{first + n}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert path.stat().st_size > 300_000
    return path


def correct(path: Path) -> None:
    """Another caption where schema 2 did not look, at the same size; the file's own times are put back."""
    stat, data = path.stat(), path.read_bytes()
    place = data.index(b"0019.txt") + tarfile.BLOCKSIZE
    assert content.PROBE < place < len(data) // 2
    path.write_bytes(data[:place] + b"777" + data[place + 3 :])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size


def one(path: Path | str, cache: Path) -> Shard:
    [shard] = survey([str(path)], WANTED, cache, "data.train")
    return shard


def tokens(shard: Shard, root: Path) -> list[int]:
    return [int(t) for t in ShardCache(root, 2**26).table(shard, PictureReader(SPEC, lengths)).tokens[:, 0]]


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What was written before the call counts as written long ago."""
    monkeypatch.setattr(content, "FRESH_NS", 10**7)
    return lambda: time.sleep(0.03)


@pytest.mark.parametrize("remembered", [True, False])
def test_a_change_in_the_middle_at_the_same_size_and_time_is_another_shard(
    tmp_path: Path, old: Callable[[], None], monkeypatch: pytest.MonkeyPatch, remembered: bool
) -> None:
    path = write(tmp_path / "x.tar")
    old() if remembered else monkeypatch.setattr(content, "FRESH_NS", 10**12)
    before = one(path, tmp_path / "cache")
    assert bool(before.version) == remembered
    assert tokens(before, tmp_path / "cache")[19] == 119
    correct(path)
    after = one(path, tmp_path / "cache")
    assert (after.identity != before.identity, after.former) == (True, before.former), "schema 2 saw no difference"
    assert tokens(after, tmp_path / "cache")[19] == 777


def test_copies_and_moves_are_the_same_shard_and_what_was_not_touched_is_not_read_again(
    tmp_path: Path, old: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write(tmp_path / "x.tar"), tmp_path / "cache"
    old()
    shard = one(path, cache)
    copy = Path(shutil.copy(path, tmp_path / "copy.tar"))
    moved = copy.rename(tmp_path / "moved.tar")
    moved.chmod(0o600)
    found = one(moved, cache)
    assert found == Shard(str(moved), shard.size, shard.identity, SAMPLES)
    assert tokens(found, cache) == tokens(shard, cache)
    assert len(list((cache / "shards").glob("*.arrow"))) == 1
    os.utime(path)
    old()
    assert one(path, cache) == shard, "touched, so it is read again, and the same"
    monkeypatch.setattr(content, "_hash", None)
    monkeypatch.setattr("raychain.data.content.open_input", None)
    assert one(path, cache) == shard


def test_a_second_change_within_a_tick_of_the_clock_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems whose time stamps tick every two seconds."""
    tick = 2 * 10**9

    def coarse(stat: os.stat_result) -> str:
        return f"{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns // tick}-{stat.st_ctime_ns // tick}"

    monkeypatch.setattr(content, "_stamp", coarse)
    path = write(tmp_path / "x.tar")
    while time.time_ns() % tick > tick // 2:
        time.sleep(0.1)
    path.touch()
    notes, stat = Folder(str(tmp_path / "notes")), path.stat()
    first = identify(str(path), notes)
    shard = one(path, tmp_path / "cache")
    correct(path)
    assert coarse(path.stat()) == coarse(stat)
    assert identify(str(path), notes).identity != first.identity
    with pytest.raises(ChangedError, match=r"x\.tar has changed"):
        tokens(shard, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "shards").iterdir())


@pytest.mark.parametrize("fresh", [True, False])
def test_a_shard_that_is_replaced_is_never_cached_as_the_one_before(
    tmp_path: Path, old: Callable[[], None], fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write(tmp_path / "x.tar"), tmp_path / "cache"
    original = path.read_bytes()
    monkeypatch.setattr(content, "FRESH_NS", 10**12) if fresh else old()
    shard = one(path, cache)
    correct(path)
    with pytest.raises(ChangedError, match="The same command again"):
        tokens(shard, cache)
    assert not list((cache / "shards").iterdir())
    path.write_bytes(original)
    assert tokens(shard, cache)[19] == 119, "other time stamps, as of a copy on another node, but the same content"


def test_a_shard_that_is_replaced_while_it_is_decoded_is_not_cached(tmp_path: Path, old: Callable[[], None]) -> None:
    path, cache = write(tmp_path / "x.tar"), tmp_path / "cache"
    other = write(tmp_path / "other.tar", first=200)
    old()
    shard = one(path, cache)
    replaced = []

    def during(texts: Sequence[str]) -> np.ndarray:
        if not replaced:
            replaced.append(other.replace(path))
        return lengths(texts)

    # batches of one picture, so that decoding is under way when the file is replaced
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raychain.data.decode.BATCH_BYTES", 3 * 16 * 16)
        with pytest.raises(ChangedError):
            ShardCache(cache, 2**26).table(shard, PictureReader(SPEC, during))
    assert replaced
    assert not list((cache / "shards").iterdir())


def test_a_shard_that_is_being_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = write(tmp_path / "x.tar"), content._hash

    def appended(file: io.FileIO) -> str:
        with path.open("ab") as more:
            more.write(bytes(512))
        return whole(file)

    monkeypatch.setattr(content, "_hash", appended)
    with pytest.raises(InputError, match="nothing writes to"):
        one(path, tmp_path / "cache")


def requests(caplog: pytest.LogCaptureFixture, method: str) -> int:
    found = sum(f"{method} /bucket/etag/" in record.getMessage() for record in caplog.records)
    caplog.clear()
    return found


def test_on_object_storage_the_etag_stands_in_and_nothing_is_read_twice(
    tmp_path: Path, bucket: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    path, address, cache = write(tmp_path / "x.tar"), bucket("etag/x.tar"), tmp_path / "cache"

    def upload() -> None:
        filesystem, target = resolve(address)
        with filesystem.open_output_stream(target) as stream:
            stream.write(path.read_bytes())

    upload()
    content.say_tags_stand_in.cache_clear()
    with caplog.at_level(logging.INFO):
        shard = one(address, cache)
        assert sum("ETags" in record.getMessage() for record in caplog.records) == 1
        assert requests(caplog, "GET") > 0, "counted by reading"
        assert one(address, cache) == shard
        assert "ETags" not in caplog.text
        assert requests(caplog, "GET") == 0
    assert tokens(shard, cache)[19] == 119
    correct(path)
    upload()
    with pytest.raises(ChangedError):
        tokens(shard, tmp_path / "another")
    after = one(address, cache)
    assert (after.identity != shard.identity, after.former, after.size) == (True, shard.former, shard.size)
    assert tokens(after, cache)[19] == 777


def test_many_shards_are_counted_on_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("raychain.data.shards.SILENT_S", -1)
    monkeypatch.setattr("raychain.terminal.counting.PLAIN_EVERY_S", -1)
    write(tmp_path / "0.tar")
    shutil.copy(tmp_path / "0.tar", tmp_path / "1.tar")
    survey([f"{tmp_path}/{n}.tar" for n in range(2)], WANTED, tmp_path / "cache", "data.train")
    assert "2 of 2" in capsys.readouterr().err
