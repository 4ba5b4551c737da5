"""Tars that lie about sizes and names, and names with dots: nothing hangs or takes memory, what is lost is said."""

import io
import json
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_broken_shards import add, pair, shard_of, six, surveyed
from test_feed import SIZE, WANTED, numbers, plain
from typer.testing import CliRunner

from raychain.cli.data import data
from raychain.data import health, members
from raychain.data.cache import ShardCache
from raychain.data.health import Bad
from raychain.data.members import Wanted
from raychain.data.pictures import PictureReader
from raychain.data.spec import Spec
from raychain.data.tar import LONGEST, split_name, walk
from raychain.evaluators.data import resolve_retrieval, resolve_zero_shot

LAST = Wanted(("txt",), key_split="last")


def header(name: bytes = b"x.png", size: bytes = b"00000000000", kind: bytes = b"0", **more: bytes) -> bytes:
    """A tar header with a right checksum, whatever its fields say."""
    block = bytearray(512)
    block[: len(name)], block[100:108], block[124 : 124 + len(size)], block[156:157] = name, b"0000644\0", size, kind
    block[257:265], block[148:156] = b"ustar\x0000", b" " * 8
    for place, value in more.items():
        block[int(place[1:]) : int(place[1:]) + len(value)] = value
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base256(number: int) -> bytes:
    return b"\x80" + number.to_bytes(11, "big") if number >= 0 else number.to_bytes(12, "big", signed=True)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(kind: bytes = b"x", **records: str) -> bytes:
    lines = b""
    for key, value in records.items():
        line = f" {key.replace('__', '.')}={value}\n".encode("utf-8", "surrogateescape")
        length = next(n for n in range(len(line), len(line) + 9) if n == len(line) + len(str(n)))
        lines += str(length).encode() + line
    return header(b"pax", b"%011o" % len(lines), kind) + padded(lines)


def long_name(name: bytes, kind: bytes = b"L") -> bytes:
    return header(b"././@LongLink", b"%011o" % len(name), kind) + padded(name)


def between(path: Path, blocks: bytes) -> bytes:
    """Three samples, then `blocks`, then three more."""
    content = six(path).read_bytes()
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[6].offset
    return content[:middle] + blocks + content[middle:]


def read(content: bytes, wanted: Wanted = WANTED) -> tuple[list[str], list[Bad]]:
    """Keys of the samples and what is bad; reading takes neither long nor much, and with and without content alike."""
    found: list[Bad] = []
    started = time.monotonic()
    tracemalloc.start()
    keys = [s["key"] for s in members.samples(io.BytesIO(content), wanted, report=found.append)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - started < 5
    assert peak < 2**23 + 4 * len(content)
    assert keys == [s["key"] for s in members.samples(io.BytesIO(content), wanted, names_only=True)]
    return keys, found


ALL = [f"{n:03}" for n in range(6)]
HEADERS = {
    "negative": (header(size=base256(-1024)), health.HEADER),
    "negative octal": (header(size=b"-0000001000"), health.HEADER),
    "minus the block itself": (header(size=base256(-512)), health.HEADER),
    "pax negative": (pax(size="-1") + header(), health.HEADER),
    "pax no number": (pax(size="1e9") + header(), health.HEADER),
    "pax number of a megabyte": (pax(size="9" * 100_000) + header(), health.HEADER),
    "records of an exabyte": (header(b"pax", base256(2**60), b"x"), health.HEADER),
    "records of 2 MiB": (header(b"pax", b"%011o" % (2 * LONGEST), b"x"), health.HEADER),
    "a name of 8 GiB": (header(b"././@LongLink", base256(2**33), b"L"), health.HEADER),
    "negative records": (header(b"pax", base256(-512), b"x"), health.HEADER),
    "a record of length 0": (header(b"pax", b"00000000010", b"x") + padded(b"0 path=x"), health.HEADER),
    "a record that is too long": (header(b"pax", b"00000000010", b"x") + padded(b"99 ath=x"), health.HEADER),
    "names without end": (long_name(b"y.png\0") * (16 * 300), health.HEADER),
    "records without a member": (pax(path="y.png") + bytes(512), health.HEADER),
    "sparse": (header(kind=b"S", size=b"00000001000", _483=base256(2**50)) + bytes(512), health.SPARSE),
    "sparse in pax": (pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize=str(2**50))
                      + header(), health.SPARSE),
    "a link with a size": (header(kind=b"2", size=base256(2**50)), health.LINK),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_lying_header_costs_nothing_but_itself(tmp_path: Path, name: str) -> None:
    blocks, kind = HEADERS[name]
    keys, bad = read(between(tmp_path / "x.tar", blocks))
    assert keys == ALL
    assert {item.kind for item in bad} == {kind}


@pytest.mark.parametrize("size", [base256(2**60), base256(2**87), b"77777777777", base256(2**31)])
def test_a_size_beyond_the_file_ends_it(tmp_path: Path, size: bytes) -> None:
    keys, bad = read(between(tmp_path / "x.tar", header(size=size)))
    assert keys == ALL[:3]
    assert [item.kind for item in bad] == [health.TRUNCATED]
    keys, bad = read(between(tmp_path / "x.tar", pax(size=str(2**60)) + header()))
    assert (keys, [item.kind for item in bad]) == (ALL[:3], [health.TRUNCATED])


def test_damage_at_every_block_takes_time_in_proportion() -> None:
    for blocks in (header(size=base256(-1)), header(b"pax", base256(2**60), b"x"), bytes(512) + header(b"x.txt")):
        keys, bad = read(blocks * (2**21 // len(blocks)))
        assert not keys
        assert bad


def test_a_member_larger_than_any_picture_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard_of(tmp_path / "x.tar", pair("big", bytes(5000), txt=b"9"), pair("text", txt=b"9" * 5000))
    monkeypatch.setattr(members, "LARGEST", 4000)
    keys, bad = read(path.read_bytes())
    assert keys == ["000", "001", "002", "003"]
    assert [(item.kind, item.key) for item in bad] == [(health.HUGE, "big"), (health.HUGE, "text")]


NAMES = ["x\x1b[2Jy.png", "x\ny.png", "caf\udce9.png", "ü" * 200 + ".png", "a/" * 300 + "b.png"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_odd_names_are_read_as_tarfile_reads_them(tmp_path: Path, name: str, form: int) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
        add(tar, name, plain(1)), add(tar, name.removesuffix("png") + "txt", b"1 0")
    keys, bad = read((tmp_path / "x.tar").read_bytes())
    assert keys == [name.removesuffix(".png").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")]
    assert not bad


def test_a_nul_in_pax_names_is_read(tmp_path: Path) -> None:
    content = between(tmp_path / "x.tar", pax(path="n\0ul.png") + header() + pax(path="n\0ul.txt") + header())
    keys, bad = read(content)
    assert keys == ALL
    assert [(item.kind, item.key) for item in bad] == [(health.EMPTY_PICTURE, "n\0ul")]
    assert "\0" not in str(bad[0])


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A tar of six samples in which headers were changed and given right checksums again, or blocks put in or lost."""
    content = bytearray(io.BytesIO(_SIX).getvalue())
    numbers = st.one_of(st.integers(-(2**87), 2**87), st.integers(-2048, 2048), st.sampled_from([2**31, 2**63, -512]))
    for _ in range(draw(st.integers(1, 4))):
        place = 512 * draw(st.integers(0, len(content) // 512 - 1))
        what = draw(st.sampled_from(["size", "kind", "field", "insert", "drop"]))
        if what == "insert":
            content[place:place] = draw(st.sampled_from([blocks for blocks, _ in HEADERS.values()]))[:8192]
            continue
        if what == "drop":
            del content[place : place + 512]
            continue
        block = content[place : place + 512]
        if what == "size":
            number = draw(numbers)
            block[124:136] = base256(number)
        elif what == "kind":
            block[156:157] = draw(st.sampled_from([bytes([c]) for c in b"01234567gxXLKSDMNV\0z"]))
        else:
            start = draw(st.integers(0, 500))
            piece = draw(st.binary(min_size=1, max_size=12))
            block[start : start + len(piece)] = piece
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        content[place : place + 512] = block[:512]
    return bytes(content)


def _six() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for n in range(6):
            name = f"{'long/' * 40 * (n % 2)}ü{n}"
            pair(name, plain(n), txt=b"1 0")(tar)
    return buffer.getvalue()


_SIX = _six()


@given(mutated())
@settings(max_examples=200, deadline=None)
def test_no_header_hangs_or_breaks_the_reading(content: bytes) -> None:
    keys, bad = read(content)
    assert bad or len(keys) >= 5  # a sample whose blocks all went missing leaves no trace
    for item in bad:
        assert str(item).isprintable()


names = st.text("ab./_\u00fc\n", min_size=1, max_size=150).filter(lambda name: name.strip("/."))


@given(st.lists(st.tuples(names, st.binary(max_size=1200)), max_size=6), st.sampled_from([0, 1, 2]))
@settings(max_examples=100, deadline=None)
def test_intact_tars_are_read_as_tarfile_reads_them(files: list[tuple[str, bytes]], form: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in files:
            try:
                add(tar, name, content)
            except ValueError:  # too long for the format
                continue
    buffer.seek(0)
    told: list[str] = []
    ours = {m.name: m.content() for m in walk(buffer, lambda kind, *_: told.append(kind)) if m.content}
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        infos = [i for i in tar if i.isfile() and not i.name.startswith("/") and ".." not in i.name.split("/")]
        theirs = {i.name: tar.extractfile(i).read() for i in infos}  # type: ignore[union-attr]
    assert ours == {name: content for name, content in theirs.items() if not _apple(name)}
    assert set(told) <= {health.UNSAFE}


def _apple(name: str) -> bool:
    return name.rpartition("/")[2].startswith("._")


# Names with dots


def dotted(path: Path) -> Path:
    """000 … 003; two pictures of names with dots; a depth map of 001; what macOS adds."""
    extra = ["photo.v1", "photo.v2"]
    return shard_of(
        path,
        *(pair(name, plain(5 + i), txt=b"9 0") for i, name in enumerate(extra)),
        pair("001.depth"),
        pair("._photo.v1", txt=b"9"),
        pair("__MACOSX/photo.v3", txt=b"9"),
        pair("in/._001", b"\0\5\x16\7", txt=b"9"),
    )


def test_pictures_lost_to_a_dot_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = surveyed(dotted(tmp_path / "x.tar"))
    assert found.samples == 4
    assert found.bad.counts == {health.DOTTED: 2}
    assert [bad.key for bad in found.bad.examples] == ["photo.v1", "photo.v2"]
    assert "photo.v1 (dot in name: data.key_split: last" in caplog.text
    result = CliRunner().invoke(data, ["check", str(tmp_path / "x.tar"), "--json", "--workers", "1"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["bad"] == {health.DOTTED: 2}


def test_a_picture_beside_one_of_its_name_is_lost_only_with_a_caption(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "x.tar", pair("003.edited", txt=b"9"), pair("003.mask"), pair("a.b.c", cls=b"1"))
    found = surveyed(path)
    assert [(bad.kind, bad.key) for bad in found.bad.examples] == [
        (health.DOTTED, "003.edited"),
        (health.DOTTED, "a.b.c"),
    ]


def test_key_split_last_reads_them(tmp_path: Path) -> None:
    path = dotted(tmp_path / "x.tar")
    found = surveyed(path, LAST)
    assert found.samples == 6
    assert found.bad.counts == {health.NO_CAPTION: 1}, "the depth map, which is a picture of its own now"
    cache = ShardCache(tmp_path / "cache", 10**7)
    table = cache.table(found, PictureReader(Spec(LAST, SIZE, "numbers"), numbers))
    assert [int(table.image(row)[0, 0, 0]) for row in range(6)] == [0, 1, 5, 6, 2, 3]
    first = cache.table(surveyed(path), PictureReader(Spec(Wanted(("txt",)), SIZE, "numbers"), numbers))
    assert first.size == 4, "the two readings are cached apart"
    result = CliRunner().invoke(data, ["check", str(path), "--json", "--workers", "1", "--key-split", "last"])
    assert json.loads(result.stdout)["usable"] == 6


@given(st.text("ab./", max_size=10))
def test_the_last_dot_parts_names_as_pathlib_does(name: str) -> None:
    key, extension = split_name(name, "last")
    file = name.rpartition("/")[2]
    stem, dot, end = file.rpartition(".")
    assert (key, extension) == ((name[: -len(end) - 1], end) if dot and stem else (None, None))


def test_first_is_what_digests_were_before() -> None:
    assert Wanted(("txt",)).digest == "7d0df60e94c2"
    assert Wanted(label=True).digest == "48c94d5136c4"
    assert Wanted(("txt",), key_split="last").digest != Wanted(("txt",)).digest


def test_evaluation_reads_names_with_dots(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    shard_of(tmp_path / "test" / "0.tar", pair("x.y", cls=b"1", txt=b"9"), pair("z", cls=b"0", txt=b"9"))
    cache = tmp_path / "cache"
    (cache / "counts").mkdir(parents=True)
    counts = {}
    for split in ("first", "last"):
        zero_shot = resolve_zero_shot(str(tmp_path), cache, key_split=split)  # type: ignore[arg-type]
        retrieval = resolve_retrieval([str(tmp_path / "test")], ["txt"], cache, key_split=split)  # type: ignore[arg-type]
        counts[split] = zero_shot.shards[0].samples, retrieval.shards[0].samples
        counts[split + " digests"] = zero_shot.digest, retrieval.digest
    assert counts["first"] == (1, 5)
    assert counts["last"] == (2, 6)
    assert not set(counts["first digests"]) & set(counts["last digests"])


def test_labels_of_a_lying_tar_are_read_without_hanging(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    path = shard_of(tmp_path / "test" / "0.tar", pair("z", cls=b"1"))
    path.write_bytes(path.read_bytes().rstrip(b"\0") + b"\0" * 512)
    content = path.read_bytes()
    path.write_bytes(content + bytes(-len(content) % 512) + header(b"q.cls", base256(-1024)) + bytes(1024))
    (tmp_path / "cache" / "counts").mkdir(parents=True)
    from raychain.errors import InputError

    with pytest.raises(InputError, match="complete tar"):
        resolve_zero_shot(str(tmp_path), tmp_path / "cache")
