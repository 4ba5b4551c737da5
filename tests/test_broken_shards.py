"""Damage in shards is counted by kind, named once, and costs only the samples that it hit."""

import io
import json
import logging
import random
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_feed import BUDGET, READER, SIZE, SPEC, WANTED, feed, load, numbers, plain, sample, write
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from raychain.data import health, members
from raychain.data.cache import ShardCache
from raychain.data.health import Bad, Tally, tally
from raychain.data.members import Wanted
from raychain.data.pictures import PictureReader
from raychain.data.shards import Shard, read, survey
from raychain.data.spec import Spec
from raychain.data.tar import split_name
from raychain.errors import InputError
from raychain.evaluators.data import resolve_retrieval
from raychain.records import TallyRecord


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


def shard_of(path: Path, *more: Callable[[tarfile.TarFile], None]) -> Path:
    """Samples 0 and 1, then whatever `more` adds, then samples 2 and 3."""
    with tarfile.open(path, "w") as tar:
        for n in (0, 1):
            add(tar, f"{n:03}.png", plain(n)), add(tar, f"{n:03}.txt", f"{n} 0".encode())
        for what in more:
            what(tar)
        for n in (2, 3):
            add(tar, f"{n:03}.png", plain(n)), add(tar, f"{n:03}.txt", f"{n} 0".encode())
    return path


def six(path: Path) -> Path:
    """Samples 0 … 5, members 2n and 2n + 1 of sample n."""
    with tarfile.open(path, "w") as tar:
        for n in range(6):
            pair(f"{n:03}", plain(n), txt=f"{n} 0".encode())(tar)
    return path


def surveyed(path: Path, wanted: Wanted = WANTED) -> Shard:
    return survey([str(path)], wanted, path.parent / "cache", "data.train")[0]


def greys(found: Shard, root: Path) -> list[int]:
    table = ShardCache(root, BUDGET).table(found, READER)
    return [int(table.image(row)[0, 0, 0]) for row in range(table.size)]


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 50,000 × 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def pair(name: str, png: bytes | None = None, **texts: bytes) -> Callable[[tarfile.TarFile], None]:
    def write_pair(tar: tarfile.TarFile) -> None:
        add(tar, f"{name}.png", plain(9) if png is None else png)
        for extension, text in texts.items():
            add(tar, f"{name}.{extension}", text)

    return write_pair


BY_NAME = {
    health.UNSAFE: [pair("../x", txt=b"9"), pair("/etc/x", txt=b"9"), pair("a/../../x", txt=b"9")],
    health.DUPLICATE: [pair("000", txt=b"9"), pair("001", txt=b"9")],
    health.NO_CAPTION: [pair("x"), pair("y", cls=b"1")],
    health.NO_PICTURE: [lambda tar: add(tar, "x.txt", b"9")],
    health.EMPTY_PICTURE: [pair("x", b"", txt=b"9")],
    health.LINK: [
        lambda tar: add(tar, "x.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        lambda tar: add(tar, "y.png", type=tarfile.LNKTYPE, linkname="000.png"),
        lambda tar: add(tar, "z.png", type=tarfile.CHRTYPE),
    ],
}
BY_CONTENT = {
    health.UNREADABLE: [pair("x", b"no picture", txt=b"9"), pair("y", plain(9)[:-30], txt=b"9")],
    health.BOMB: [pair("x", bomb(), txt=b"9")],
    health.TEXT: [pair("x", txt=b"\xff\xfe9"), pair("y", json=b"{"), pair("z", json=rb'{"more": "\ud800"}')],
    health.NO_CAPTION: [pair("x", txt=b" \n"), pair("y", json=b'{"more": []}')],
}


@pytest.mark.parametrize("kind", BY_NAME)
def test_what_names_tell_is_counted_by_the_survey(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    found = surveyed(shard_of(tmp_path / "x.tar", *BY_NAME[kind]))
    assert found.bad.counts == {kind: len(BY_NAME[kind])}
    assert found.samples == 4
    assert greys(found, tmp_path / "cache") == [0, 1, 2, 3]
    again = surveyed(tmp_path / "x.tar")
    assert again.bad == found.bad, "kept with the count"
    [record] = caplog.records
    assert f"x.tar: skipped {len(BY_NAME[kind])} {kind}" in record.getMessage()


@pytest.mark.parametrize("kind", BY_CONTENT)
def test_what_content_tells_is_counted_when_decoded_and_kept_with_the_table(tmp_path: Path, kind: str) -> None:
    count = len(BY_CONTENT[kind])
    found = surveyed(shard_of(tmp_path / "x.tar", *BY_CONTENT[kind]))
    assert (found.samples, bool(found.bad)) == (4 + count, False)
    assert greys(found, tmp_path / "cache") == [0, 1, 2, 3]
    served = ShardCache(tmp_path / "cache", BUDGET).table(
        found, PictureReader(SPEC, lambda texts: pytest.fail("decoded again"))
    )
    assert served.bad.counts == {kind: count}
    assert served.bad.examples[0].key == "x"
    assert " at 0x" not in str(served.bad), "no memory addresses, so that it reads the same everywhere"


def test_two_samples_in_a_row_with_one_name_are_the_first(tmp_path: Path) -> None:
    found = surveyed(shard_of(tmp_path / "x.tar", pair("x", plain(7), txt=b"7"), pair("x", plain(8), txt=b"8")))
    assert found.bad.counts == {health.DUPLICATE: 1}
    assert greys(found, tmp_path / "cache") == [0, 1, 7, 2, 3]


def test_names_that_are_fine_are_not_counted(tmp_path: Path) -> None:
    def more(tar: tarfile.TarFile) -> None:
        add(tar, "folder/", type=tarfile.DIRTYPE)
        add(tar, "./folder/9.png", plain(9))
        add(tar, "./folder/9.txt", b"9")
        add(tar, "folder/9..x/1.txt.npy", b"9")
        add(tar, "README", b"9")
        add(tar, "._000.png", b"9")
        add(tar, "stats.npy", b"9")
        add(tar, "8.key", b"9")

    found = surveyed(shard_of(tmp_path / "x.tar", more))
    assert not found.bad
    assert greys(found, tmp_path / "cache") == [0, 1, 9, 2, 3]


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    found = surveyed(shard_of(tmp_path / "x.tar", pair("caf\udce9", txt=b"9")))
    assert greys(found, tmp_path / "cache") == [0, 1, 9, 2, 3]


# Damaged files


@pytest.mark.parametrize(
    ("member", "place", "left"),
    [
        (4, "header", 2),
        (5, "header", 2),
        (4, "data", 2),
        (5, "data", 2),
        (10, "data", 5),
        (11, "data", 5),
        (0, "end", 6),
    ],
)
def test_a_truncated_shard_gives_the_samples_before_the_damage(
    tmp_path: Path, member: int, place: str, left: int
) -> None:
    path = six(tmp_path / "x.tar")
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
    if place == "end":
        cut = infos[-1].offset_data + 512
    else:
        info = infos[member]
        cut = info.offset + 300 if place == "header" else info.offset_data + info.size - 1
    path.write_bytes(path.read_bytes()[:cut])
    found = surveyed(path)
    assert found.bad.counts == {health.TRUNCATED: 1}
    assert found.samples == left
    assert greys(found, tmp_path / "cache") == list(range(found.samples))


@pytest.mark.parametrize("filler", [b"\0", b"\xff", None])
def test_a_damaged_header_costs_its_own_sample_only(tmp_path: Path, filler: bytes | None) -> None:
    path = six(tmp_path / "x.tar")
    with tarfile.open(path) as tar:
        header = tar.getmembers()[4].offset
    content = bytearray(path.read_bytes())
    content[header : header + 512] = filler * 512 if filler else random.Random(0).randbytes(512)
    path.write_bytes(content)
    found = surveyed(path)
    assert found.bad.counts[health.HEADER] == 1
    assert greys(found, tmp_path / "cache") == [0, 1, 3, 4, 5]


@given(st.integers(0, 12_000), st.binary(min_size=1, max_size=2000))
def test_no_damage_stops_the_reading(tmp_path_factory: pytest.TempPathFactory, place: int, rubbish: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.tar"
    six(path)
    content = bytearray(path.read_bytes())
    content[place : place + len(rubbish)] = rubbish
    found: list[Bad] = []
    names = [s["key"] for s in members.samples(io.BytesIO(content), WANTED, names_only=True, report=found.append)]
    assert names == [s["key"] for s in members.samples(io.BytesIO(content), WANTED)], "survey and decoding agree"
    assert len(names) >= 6 - len(rubbish) // 1024 - 3
    assert found or len(names) == 6


def test_files_that_are_no_tar_count_as_damaged_beside_good_ones(tmp_path: Path) -> None:
    good = shard_of(tmp_path / "good.tar")
    (tmp_path / "html.tar").write_bytes(b"<html>not found</html>" * 100)
    (tmp_path / "empty.tar").write_bytes(b"")
    paths = [str(tmp_path / "html.tar"), str(good), str(tmp_path / "empty.tar")]
    found = survey(paths, WANTED, tmp_path / "cache", "data.train")
    assert [s.samples for s in found] == [0, 4, 0]
    assert [s.bad.counts for s in found] == [{health.HEADER: 1}, {}, {health.TRUNCATED: 1}]


def test_measured_shards_must_be_whole(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "x.tar")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"^evaluate\.retrieval\n(.|\n)*complete tar(.|\n)*truncated"):
        resolve_retrieval([str(path)], ["txt"], tmp_path / "cache")


def test_a_shard_that_changed_since_the_survey_is_an_error(tmp_path: Path) -> None:
    found = surveyed(shard_of(tmp_path / "x.tar"))
    shard_of(tmp_path / "x.tar", pair("x", txt=b"9"))
    with pytest.raises(OSError, match=r"x\.tar has changed since it was counted"):
        greys(found, tmp_path / "cache")


# What the loader makes of it


def test_a_bad_sample_is_replaced_by_one_of_its_shard_on_any_rank(tmp_path: Path) -> None:
    samples = [sample(n) for n in range(8)]
    samples[2]["png"] = b"no picture"
    other = [sample(n) for n in range(8, 16)]
    paths = [write(tmp_path / "a.tar", samples), write(tmp_path / "b.tar", other)]
    found = survey(paths, WANTED, tmp_path / "cache", "data.train")
    cache = ShardCache(tmp_path / "cache", BUDGET)
    told: list[tuple[str, Tally]] = []
    report = {"report": lambda shard, bad: told.append((shard.address, bad))}
    [whole] = load(feed(found), cache, batch=16, stop=1, **report)
    drawn = sorted(whole["images"][:, 0, 0, 0].tolist())
    assert drawn == sorted([*range(16), 0][i] for i in range(17) if i != 2), "row 7 of 7 is row 0 again"
    halves = [load(feed(found), cache, batch=16, stop=1, rank=rank, world=2)[0] for rank in range(2)]
    assert torch.equal(torch.cat([half["images"] for half in halves]), whole["images"])
    assert {address for address, _ in told} == {paths[0]}
    assert told[0][1] == tally([Bad(health.UNREADABLE, "002", "no picture that Pillow knows")])


def test_a_shard_is_named_once_over_epochs_and_loaders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = [sample(n) for n in range(8)] + [{"png": b"?", "txt": "9"}]
    found = survey([write(tmp_path / "once.tar", samples)], WANTED, tmp_path / "cache", "data.train")
    with caplog.at_level(logging.WARNING, "raychain.data"):
        for _ in range(2):
            load(feed(found), ShardCache(tmp_path / "cache", BUDGET), batch=9, stop=4)
    assert len(caplog.records) == 1


def test_transparent_pictures_decode_without_warnings(tmp_path: Path) -> None:
    found = surveyed(shard_of(tmp_path / "x.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(greys(found, tmp_path / "cache")) == 4


def test_specs_with_and_without_sentences_are_cached_apart(tmp_path: Path) -> None:
    text = {"more": "1 0. 1 1. 1 2."}
    path = tmp_path / "x.tar"
    write(path, [{"png": plain(1), "json": text}])
    cache, sizes = ShardCache(tmp_path / "cache", BUDGET), []
    for key in ("json.more", "json.more|sentences"):
        wanted = Wanted((key,))
        found = surveyed(path, wanted)
        sizes.append(len(cache.table(found, PictureReader(Spec(wanted, SIZE, "numbers"), numbers)).tokens))
    assert sizes == [1, 3]


# Names and tallies


@given(st.text(alphabet="ab./", max_size=12))
@example("a/b.c/d.jpg")
@example("../x.jpg")
def test_names_are_split_as_webdataset_does(name: str) -> None:
    assert split_name(name) == base_plus_ext(name)


def test_a_tally_keeps_the_first_of_each_kind_and_survives_json() -> None:
    found = [Bad("a", str(n)) for n in range(10)] + [Bad("b", "x", "why")]
    counted = tally(found)
    assert counted.counts == {"a": 10, "b": 1}
    assert [bad.key for bad in counted.examples] == ["0", "1", "2", "x"]
    assert Tally.of(TallyRecord.of(json.loads(counted.record().document()))) == counted
    assert str(counted) == "10 a, 1 b: 0 (a), 1 (a), 2 (a), x (b: why)"


def test_names_cannot_write_to_the_terminal() -> None:
    assert str(Bad("a", "x\x1b[2Jy\n", "z")) == "x�[2Jy� (a: z)"


def test_read_reports_too(tmp_path: Path) -> None:
    found = surveyed(shard_of(tmp_path / "x.tar", pair("x")))
    told: list[Bad] = []
    assert len(list(read(found, WANTED, told.append))) == 4
    assert told == [Bad(health.NO_CAPTION, "x")]


# Sound shards

STEMS = st.text(alphabet="abü_- 0", min_size=1, max_size=8) | st.text(alphabet="x", min_size=90, max_size=300)
KEYS = st.builds(lambda folders, stem: "/".join([*folders, stem]), st.lists(STEMS, max_size=2), STEMS)
EXTENSIONS = st.lists(
    st.sampled_from(["png", "jpg", "txt", "TXT", "json", "depth.png", "npy", "cls"]), unique_by=str.lower
)
SAMPLES = st.dictionaries(KEYS.filter(lambda key: not key.startswith(("__", "/"))), EXTENSIONS, max_size=6)


@given(SAMPLES, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.data())
def test_sound_shards_have_the_samples_that_webdataset_finds(
    wanted: dict[str, list[str]], kind: int, data: st.DataObject
) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=kind) as tar:
        for key, extensions in wanted.items():
            for extension in extensions:
                try:
                    add(tar, f"{key}.{extension}", data.draw(st.binary(min_size=1, max_size=2000)))
                except ValueError:  # too long a name for this kind of tar
                    continue
    content.seek(0)
    files = ({**file, "__url__": "here"} for file in tar_file_iterator(content))
    theirs = [
        {name: value for name, value in found.items() if name in ("png", "jpg", "txt")} | {"key": found["__key__"]}
        for found in group_by_keys(files)
        if "txt" in found and ("png" in found or "jpg" in found)
    ]
    content.seek(0)
    reports: list[Bad] = []
    assert list(members.samples(content, Wanted(("txt",)), report=reports.append)) == theirs
    assert not {bad.kind for bad in reports} - {health.NO_CAPTION, health.NO_PICTURE, health.DOTTED}
