"""What is known of shards without reading them, and what happens where it is wrong."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from raychain.cli.data import data as data_app
from raychain.cli.run import run_command
from raychain.config.loading import validate
from raychain.core.record import warn
from raychain.core.storage import Folder
from raychain.data import content
from raychain.data.cache import ShardCache
from raychain.data.content import Hashed
from raychain.data.index import BEFORE, FROM_INDEX, FROM_PARQUET, FROM_SIZES, FROM_STATS, INDEX, READ, SIZES, described
from raychain.data.members import Wanted
from raychain.data.pictures import PictureReader
from raychain.data.shards import Shard, survey
from raychain.data.spec import Spec
from raychain.dataprep.index import index_shards
from raychain.errors import InputError
from raychain.runs.resolve import dry_plan, make_task

WANTED = Wanted(("txt",))
SAMPLES = 12


def write(folder: Path, shards: int = 2, samples: int = SAMPLES) -> list[str]:
    """Shards of 12 noisy pictures, 90 KB each, as img2dataset names them."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for n in range(samples):
                picture = io.BytesIO()
                Image.fromarray(noise.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(picture, "png")
                for name, content in ((f"{n:04}.png", picture.getvalue()), (f"{n:04}.txt", b"caption")):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return [str(folder / f"{shard:05d}.tar") for shard in range(shards)]


def known(addresses: Sequence[str], cache: Path, **options: Any) -> list[Shard]:
    return survey(addresses, WANTED, cache, "data.train", **options)


def told(shards: Sequence[Shard]) -> list[tuple[int, str]]:
    return [(shard.samples, shard.source) for shard in shards]


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After its call no shard can be read."""

    def forbid() -> None:
        monkeypatch.setattr(content, "_hash", None)
        monkeypatch.setattr("raychain.data.content.open_input", None)

    return forbid


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is said once a process is said to each test."""
    warn.cache_clear()
    content.say_tags_stand_in.cache_clear()
    caplog.set_level(logging.INFO)
    return caplog


class Bucket:
    """A folder of the bucket, and what was asked of it."""

    def __init__(self, make: Callable[[str], str], name: str, log: pytest.LogCaptureFixture) -> None:
        self._make, self._name, self._log = make, name, log
        self.folder = Folder(make(name))

    def put(self, folder: Path) -> list[str]:
        """Uploads a folder's files; the addresses of its shards."""
        for path in folder.iterdir():
            self.folder.write(path.name, path.read_bytes())
        self._log.clear()
        return [self._make(f"{self._name}/{path.name}") for path in sorted(folder.glob("*.tar"))]

    def reads(self, ending: str = "tar") -> int:
        """GET requests for files with the ending since the last call of this method or `put`."""
        pattern = re.compile(rf"GET /bucket/{self._name}/\S+\.{ending}[ ?]")
        found = sum(bool(pattern.search(record.getMessage())) for record in self._log.records)
        self._log.clear()
        return found


@pytest.fixture
def bucket_folder(
    bucket: Callable[[str], str], said: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> Callable[[str], Bucket]:
    test = re.sub("[^a-z0-9]", "-", request.node.name)
    return lambda name: Bucket(bucket, f"{test}-{name}", said)


# -- raychain's index


def test_with_an_index_local_shards_are_not_read_and_are_the_same(
    tmp_path: Path, unread: Callable[[], None], said: pytest.LogCaptureFixture
) -> None:
    paths = write(tmp_path / "data")
    read = known(paths, tmp_path / "a")
    assert told(read) == [(SAMPLES, READ)] * 2
    made = index_shards(paths, WANTED)
    assert (made["shards"], made["samples"], made["read"]) == (2, 2 * SAMPLES, 2)
    assert json.loads((tmp_path / "data" / SIZES).read_text()) == {"00000.tar": SAMPLES, "00001.tar": SAMPLES}
    unread()
    found = known(paths, tmp_path / "b", exact=True)
    assert found == read
    assert [shard.former for shard in found] == [shard.former for shard in read]
    assert told(found) == [(SAMPLES, FROM_INDEX)] * 2
    assert index_shards(paths, WANTED)["read"] == 0, "it is known"


def test_a_copied_index_still_knows_copied_shards_that_keep_their_times(
    tmp_path: Path, unread: Callable[[], None]
) -> None:
    paths = write(tmp_path / "data")
    index_shards(paths, WANTED)
    read = known(paths, tmp_path / "a")
    shutil.copytree(tmp_path / "data", tmp_path / "copy")  # as cp -p
    unread()
    copies = known([path.replace("/data/", "/copy/") for path in paths], tmp_path / "b")
    assert [shard.identity for shard in copies] == [shard.identity for shard in read]


def test_a_shard_that_was_touched_is_read_again_and_the_others_are_not(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    paths = [Path(path) for path in write(tmp_path / "data", 3)]
    index_shards([str(path) for path in paths], WANTED)
    first = known([str(path) for path in paths], tmp_path / "a")
    stat, text = paths[1].stat(), paths[1].read_bytes()
    paths[1].write_bytes(text.replace(b"caption", b"CAPTION"))
    os.utime(paths[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the size and the time are what they were
    os.utime(paths[2], ns=(0, 0))
    found = known([str(path) for path in paths], tmp_path / "b")
    assert [source for _, source in told(found)] == [FROM_INDEX, READ, FROM_INDEX]
    assert [a.identity == b.identity for a, b in zip(first, found, strict=True)] == [True, False, True]
    assert "2 shards of data.train are not as their index has them" in said.text
    assert index_shards([str(path) for path in paths], WANTED)["read"] == 1
    said.clear()
    assert told(known([str(path) for path in paths], tmp_path / "c")) == [(SAMPLES, FROM_INDEX)] * 3
    assert "not as their index" not in said.text


def test_other_formats_are_counted_beside_one_another(tmp_path: Path, unread: Callable[[], None]) -> None:
    paths = write(tmp_path / "data")
    labels = Wanted(label=True)
    index_shards(paths, WANTED)
    index_shards(paths, labels)
    pictures = Wanted()
    assert told(survey(paths, pictures, tmp_path / "a", "x")) == [(SAMPLES, READ)] * 2
    unread()
    assert told(known(paths, tmp_path / "b")) == [(SAMPLES, FROM_INDEX)] * 2
    with pytest.raises(InputError, match="without a usable sample"):
        survey(paths, labels, tmp_path / "b", "x")


BAD = [
    b"", b"{", b"[]", b"7", b"\xff", b"{}", b'{"schema": 1, "shards": 3}', b'{"schema": 1, "shards": [{}]}',
    b'{"schema": 1, "shards": [{"address": "00000.tar", "size": -1, "version": "", "samples": {}}]}',
    b'{"schema": 1, "shards": [{"address": "0.tar", "size": 1, "version": "x", "identity": "../..", "samples": {}}]}',
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_a_damaged_index_is_said_and_not_used(tmp_path: Path, text: bytes, said: pytest.LogCaptureFixture) -> None:
    paths = write(tmp_path / "data")
    (tmp_path / "data" / INDEX).write_bytes(text)
    assert told(known(paths, tmp_path / "cache")) == [(SAMPLES, READ)] * 2
    assert INDEX in said.text
    assert index_shards(paths, WANTED)["samples"] == 2 * SAMPLES
    assert (tmp_path / "data" / f"{INDEX}.damaged-1").read_bytes() == text


def test_an_index_of_a_newer_version_and_one_of_other_shards(tmp_path: Path) -> None:
    paths = write(tmp_path / "data")
    index = tmp_path / "data" / INDEX
    index_shards(paths, WANTED)
    index.write_text(index.read_text().replace("0000", "9999"))
    assert told(known(paths, tmp_path / "cache")) == [(SAMPLES, READ)] * 2
    index.write_text('{"schema": 2, "shards": []}')
    with pytest.raises(InputError, match="which a newer raychain wrote"):
        known(paths, tmp_path / "cache")


@given(st.lists(st.tuples(st.integers(0, 30_000), st.integers(0, 9_000)), max_size=8))
def test_a_file_is_hashed_whole_however_it_is_read(moves: list[tuple[int, int]]) -> None:
    whole = np.random.default_rng(0).integers(0, 256, 25_000, dtype=np.uint8).tobytes()
    passed = Hashed(io.BytesIO(whole), len(whole))
    file = io.BufferedReader(passed, 1000)
    for place, size in moves:
        file.seek(place)
        assert file.read(size) == whole[place : place + size]
    assert passed.hexdigest() == xxhash.xxh3_128_hexdigest(whole)


# -- object storage


def test_an_index_of_a_bucket_makes_its_shards_those_of_the_disk(
    tmp_path: Path, bucket_folder: Callable[[str], Bucket], said: pytest.LogCaptureFixture
) -> None:
    local = known(write(tmp_path / "data"), tmp_path / "a")
    one, two = bucket_folder("one"), bucket_folder("two")
    paths = one.put(tmp_path / "data")
    index_shards(paths, WANTED)
    assert one.reads() > 0
    found = known(paths, tmp_path / "b", exact=True)
    assert one.reads() == 0
    assert found == [Shard(p, shard.size, shard.identity, SAMPLES) for p, shard in zip(paths, local, strict=True)]
    assert told(found) == [(SAMPLES, FROM_INDEX)] * 2
    assert "ETags" not in said.text
    assert told(known(paths, tmp_path / "b")) == [(SAMPLES, FROM_INDEX)] * 2
    for name in one.folder.list(""):
        (tmp_path / "down").mkdir(exist_ok=True)
        (tmp_path / "down" / name).write_bytes(one.folder.read(name) or b"")
    copies = known(two.put(tmp_path / "down"), tmp_path / "c")
    assert (two.reads(), [s.identity for s in copies]) == (0, [s.identity for s in local]), "in another bucket"
    reader = PictureReader(Spec(WANTED, 32, "ones"), lambda texts: np.ones((len(texts), 1)))
    assert ShardCache(tmp_path / "d", 2**24).table(copies[0], reader).size == SAMPLES


def test_a_shard_of_a_bucket_that_is_not_as_indexed_is_hashed_anew(
    tmp_path: Path, bucket_folder: Callable[[str], Bucket], said: pytest.LogCaptureFixture
) -> None:
    paths = write(tmp_path / "data")
    index_shards(paths, WANTED)
    local = known(paths, tmp_path / "a")
    bucket = bucket_folder("x")
    uploaded = bucket.put(tmp_path / "data")  # with an index that has the time stamps of the disk
    found = known(uploaded, tmp_path / "b")
    assert "2 shards of data.train are not as their index" in said.text
    assert ([s.identity for s in found], bucket.reads() > 0) == ([s.identity for s in local], True)
    assert known(uploaded, tmp_path / "b") == found
    assert bucket.reads() == 0, "the hash is kept"
    bucket.folder.write("00000.tar", Path(paths[1]).read_bytes())
    with pytest.raises(content.ChangedError), content.unchanged(found[0]):
        pass
    assert known(uploaded, tmp_path / "b")[0].identity == local[1].identity


STATS = {"count": 15, "successes": SAMPLES, "failed_to_download": 3, "status_dict": {"success": SAMPLES}}


def test_counts_beside_shards_of_a_bucket_stand_in_for_reading(
    tmp_path: Path, bucket_folder: Callable[[str], Bucket], said: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "data", 5)
    (tmp_path / "data" / SIZES).write_text(json.dumps({"00000.tar": 11, "00001.tar": "10", "99999.tar": 3}))
    (tmp_path / "data" / "00001_stats.json").write_text(json.dumps(STATS))
    (tmp_path / "data" / "00002_stats.json").write_text(json.dumps(STATS))
    status = pa.table({"status": ["success"] * 9 + ["failed_to_download"], "url": ["x"] * 10})
    pq.write_table(status, tmp_path / "data" / "00003.parquet")
    bucket = bucket_folder("x")
    paths = bucket.put(tmp_path / "data")
    found = known(paths[:4], tmp_path / "cache")
    assert told(found) == [(11, FROM_SIZES), (10, FROM_SIZES), (SAMPLES, FROM_STATS), (9, FROM_PARQUET)]
    assert "data.train: 2 shards from sizes.json, 1 from _stats.json, 1 from parquet, and not by reading" in said.text
    assert "told apart by their ETags" in said.text
    assert bucket.reads() == 0
    assert told(known(paths, tmp_path / "cache"))[4] == (SAMPLES, READ)
    assert told(known(paths[:1], tmp_path / "cache", exact=True)) == [(SAMPLES, READ)], "what is measured is counted"
    assert told(known(paths[:1], tmp_path / "cache")) == [(SAMPLES, BEFORE)]


WRONG = [
    {SIZES: b"[1]"}, {SIZES: b"{"}, {SIZES: b'{"00000.tar": -5}'}, {SIZES: b'{"00000.tar": 1.5}'},
    {SIZES: b'{"00000.tar": "many"}'}, {SIZES: b'{"00000.tar": true}'}, {SIZES: b'{"00000.tar": 1e400}'},
    {"00000_stats.json": b"{}"}, {"00000_stats.json": b'{"successes": null}'}, {"00000_stats.json": b"[" * 9000},
    {"00000_stats.json": b'{"rows": 2, "samples": 2, "bytes": 1, "failed": []}'}, {"00000.parquet": b"PAR1"},
]  # fmt: skip


@pytest.mark.parametrize("files", WRONG)
def test_counts_that_are_none_are_said_and_not_used(
    tmp_path: Path, bucket_folder: Callable[[str], Bucket], files: dict[str, bytes], said: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "data", 1)
    for name, text in files.items():
        (tmp_path / "data" / name).write_bytes(text)
    paths = bucket_folder("x").put(tmp_path / "data")
    assert told(known(paths, tmp_path / "cache")) == [(SAMPLES, READ)]
    assert any(name in said.text for name in files)


@pytest.mark.parametrize(("count", "text"), [(SAMPLES + 3, "used more often"), (SAMPLES - 3, "3 are never used")])
def test_a_wrong_count_is_said_when_the_shard_is_decoded(
    tmp_path: Path, bucket_folder: Callable[[str], Bucket], said: pytest.LogCaptureFixture, count: int, text: str
) -> None:
    write(tmp_path / "data", 1)
    (tmp_path / "data" / SIZES).write_text(json.dumps({"00000.tar": count}))
    [shard] = known(bucket_folder("x").put(tmp_path / "data"), tmp_path / "cache")
    reader = PictureReader(Spec(WANTED, 32, "ones"), lambda texts: np.ones((len(texts), 1)))
    assert ShardCache(tmp_path / "b", 2**24).table(shard, reader).size == SAMPLES
    assert text in said.text


# -- runs and commands


def on_bucket(tmp_path: Path, address: str) -> dict[str, Any]:
    return {
        "name": "x", "data": {"train": address}, "chain": [{"model": "CoM-micro-S", "epochs": 2}],
        "train": {"global_batch": 8, "warmup": "10 %"}, "preload": {"cache": str(tmp_path / "cache")},
        "storage": str(tmp_path / "runs"),
    }  # fmt: skip


@pytest.mark.parametrize("with_index", [True, False])
def test_a_plan_reads_no_shard_of_a_bucket(
    tmp_path: Path, bucket_folder: Callable[[str], Bucket], bucket: Callable[[str], str], with_index: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write(tmp_path / "data", 4)
    for shard in range(4):
        (tmp_path / "data" / f"{shard:05d}_stats.json").write_text(json.dumps(STATS))
    place = bucket_folder("x")
    paths = place.put(tmp_path / "data")
    if with_index:
        index_shards(paths, WANTED)
        place.reads()
    experiment = on_bucket(tmp_path, paths[0].replace("00000.tar", "{00000..00003}.tar"))
    task = make_task(validate(experiment), str(tmp_path / "runs" / "x"), store=str(tmp_path / "runs"))
    assert task.stages[0].feed.order.samples == 4 * SAMPLES
    assert place.reads() == 0
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(experiment))
    run_command(str(tmp_path / "x.yaml"), dry_run=True)
    source = FROM_INDEX if with_index else FROM_STATS
    assert f"counts: 4 shards {source}\n" in capsys.readouterr().out
    sizes = {name: len(place.folder.read(name) or b"") for name in place.folder.list("")}
    whole = sum(size for name, size in sizes.items() if name.endswith(".tar"))
    read = sizes[INDEX] if with_index else sum(size for name, size in sizes.items() if "_stats" in name)
    assert read < 0.01 * whole


def test_what_a_run_had_to_read_is_kept_for_the_next_node(
    tmp_path: Path, bucket_folder: Callable[[str], Bucket]
) -> None:
    write(tmp_path / "data")
    place = bucket_folder("x")
    paths = place.put(tmp_path / "data")
    experiment, keys = on_bucket(tmp_path, paths[0].replace("00000.tar", "{00000..00001}.tar")), []
    for node, reads in enumerate((True, False)):
        experiment["preload"] = {"cache": str(tmp_path / f"node{node}")}
        task = make_task(validate(experiment), str(tmp_path / "runs" / "x"), store=str(tmp_path / "runs"))
        keys.append(task.stages[0].key)
        assert bool(place.reads()) == reads
    assert keys[0] == keys[1]
    assert dry_plan(validate(experiment))["counts"] == {BEFORE: 2}


def test_counts_that_nobody_checked_are_part_of_keys(tmp_path: Path, bucket_folder: Callable[[str], Bucket]) -> None:
    write(tmp_path / "data")
    place, keys = bucket_folder("x"), []
    for count in (None, SAMPLES, SAMPLES, SAMPLES - 2):
        if count:
            sizes = {"00000.tar": count, "00001.tar": 2 * SAMPLES - count}
            (tmp_path / "data" / SIZES).write_text(json.dumps(sizes))
        paths = place.put(tmp_path / "data")
        experiment = on_bucket(tmp_path, paths[0].replace("00000.tar", "{00000..00001}.tar"))
        experiment["preload"] = {"cache": str(tmp_path / f"node{count}")}
        keys.append(make_task(validate(experiment), str(tmp_path / "runs" / "x")).stages[0].key)
    assert len(set(keys)) == 3
    assert keys[1] == keys[2]


def index_command(*arguments: object) -> tuple[int, str, BaseException | None]:
    result = CliRunner().invoke(data_app, ["index", *map(str, arguments)])
    return result.exit_code, result.stdout, result.exception


def test_the_command_writes_beside_the_shards_or_elsewhere(tmp_path: Path, unread: Callable[[], None]) -> None:
    paths = write(tmp_path / "data", 3)
    status, out, _ = index_command(tmp_path / "data")
    assert status == 0
    assert "3 of them read: 36 samples with a picture" in out
    assert sorted(p.name for p in (tmp_path / "data").iterdir() if p.suffix == ".json") == [INDEX, SIZES]
    (tmp_path / "data" / INDEX).unlink()
    (tmp_path / "data" / SIZES).unlink()
    storage = tmp_path / "runs"
    status, out, _ = index_command(tmp_path / "data", "--out", storage, "--json")
    assert (status, json.loads(out)["folders"]) == (0, [str(storage)])
    assert not (tmp_path / "data" / INDEX).exists()
    unread()
    plan = dry_plan(validate(on_bucket(tmp_path, str(tmp_path / "data"))))
    assert plan["counts"] == {FROM_INDEX: 3}
    assert index_command(*paths, "--out", storage)[0] == 0


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    (tmp_path / "file").write_text("")
    for arguments in (
        [tmp_path / "none"],
        [tmp_path / "a", "--captions", "."],
        [tmp_path / "a", "--captions", "txt", "--labels"],
        [tmp_path / "a", "--out", tmp_path / "file"],
        [tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c"],
    ):
        assert isinstance(index_command(*arguments)[2], InputError), arguments
    assert not (tmp_path / "c").exists()
    assert index_command(tmp_path / "a", tmp_path / "b")[0] == 0
    assert (tmp_path / "a" / INDEX).exists()
    assert (tmp_path / "b" / INDEX).exists()


def test_what_open_clip_has_of_other_shards_stays(tmp_path: Path) -> None:
    paths = write(tmp_path / "data")
    (tmp_path / "data" / SIZES).write_text('{"other.tar": 5, "00000.tar": 1}')
    index_shards(paths, WANTED)
    found = json.loads((tmp_path / "data" / SIZES).read_text())
    assert found == {"00000.tar": SAMPLES, "00001.tar": SAMPLES, "other.tar": 5}


def test_counts_in_words() -> None:
    assert (
        described({READ: 5, FROM_INDEX: 1200, FROM_SIZES: 3})
        == "1,200 shards from the index, 3 from sizes.json, 5 read"
    )
    assert described({}) == ""
