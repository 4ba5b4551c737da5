"""`raychain data check` and `raychain data build`, on real tars, real files and a real HTTP server."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_broken_shards import pair, shard_of
from test_feed import encode, plain

from raychain.cli.commands import commands
from raychain.cli.program import guarded
from raychain.data import health, pixels
from raychain.data.addresses import expand
from raychain.data.members import Wanted, captions
from raychain.data.shards import read, survey
from raychain.dataprep import fetch as fetching
from raychain.dataprep.check import spread
from raychain.dataprep.fetch import FetchError, fetch
from raychain.dataprep.table import open_table
from raychain.errors import InputError


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> tuple[int, str, str]:
    """Status, stdout and stderr of `raychain data …`."""
    monkeypatch.setattr(sys, "argv", ["raychain", "data", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        guarded(commands)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture
def data(capsys, monkeypatch):
    return lambda *arguments: call(capsys, monkeypatch, *arguments)


# check


def test_checking_good_shards_is_status_0_and_one_document(data, tmp_path):
    for i in range(2):
        shard_of(tmp_path / f"{i}.tar", pair("9", plain(9, (40, 30)), txt=b"9", json=b'{"more": ["a. b", "c"]}'))
    arguments = (tmp_path, "--captions", "txt", "--captions", "json.more", "--workers", 1)
    status, out, _ = data("check", *arguments, "--json")
    result = json.loads(out)
    assert status == 0
    assert (result["shards"], result["samples"], result["usable"], result["bad"]) == (2, 10, 10, {})
    assert result["width"] == {"min": 16, "median": 16, "max": 40}
    assert result["height"] == {"min": 16, "median": 16, "max": 30}
    assert result["captions"] == {"min": 1, "median": 1, "max": 3}
    status, out, _ = data("check", *arguments)
    assert status == 0
    assert "16 / 16 / 40" in out


def test_checking_bad_shards_is_status_1_and_lists_them(data, tmp_path):
    shard_of(tmp_path / "a.tar", pair("x", b"no picture", txt=b"9"), pair("y"), pair("../z", txt=b"9"))
    path = shard_of(tmp_path / "b.tar")
    path.write_bytes(path.read_bytes()[:3000])
    status, out, err = data("check", tmp_path / "*.tar", "--json")
    result = json.loads(out)
    assert status == 1
    assert result["bad"] == {
        "missing caption": 1,
        "truncated shard": 1,
        "unreadable picture": 1,
        "unsafe name": 1,
    }
    assert (result["samples"], result["usable"], result["missing_captions"]) == (9, 5, 1)
    named = {(Path(item["shard"]).name, item["key"]) for item in result["bad_samples"]}
    assert named >= {("a.tar", "x"), ("a.tar", "y"), ("a.tar", "../z")}
    status, out, _ = data("check", tmp_path / "*.tar", "--max-bad-fraction", 0.5, "--workers", 1)
    assert status == 0
    assert "a.tar: x – no picture that Pillow knows" in " ".join(out.split())
    assert "Traceback" not in err


def test_a_picture_that_only_full_decoding_finds_broken_is_found(data, tmp_path):
    whole = encode(Image.effect_noise((300, 300), 90).convert("RGB"), "jpeg")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in (("a.jpg", whole), ("a.txt", b"1"), ("b.jpg", whole[:-3000]), ("b.txt", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    _, out, _ = data("check", tmp_path / "x.tar", "--json")
    assert [item["key"] for item in json.loads(out)["bad_samples"]] == ["b"]


@pytest.mark.parametrize("arguments", [["nowhere-*.tar"], ["x.tar", "--captions", "txt|words"]])
def test_wrong_arguments_of_check_are_status_2(data, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    shard_of(tmp_path / "x.tar")
    status, out, err = data("check", *arguments)
    assert (status, out) == (2, "")
    assert "allowed" in err


def test_the_module_runs_as_a_program_too(tmp_path):
    shard_of(tmp_path / "0.tar")
    shard_of(tmp_path / "1.tar")
    command = [sys.executable, "-m", "raychain.data", "check", str(tmp_path), "--json", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usable"] == 8


def test_the_commands_need_neither_torch_nor_ray():
    script = "import sys, raychain.cli.data, raychain.dataprep.check, raychain.dataprep.build\n"
    script += "assert not {'torch', 'ray'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_spread_is_min_lower_median_max():
    assert spread(Counter({3: 1, 1: 1, 2: 2})) == {"min": 1, "median": 2, "max": 3}
    assert spread(Counter({5: 1, 1: 1})) == {"min": 1, "median": 1, "max": 5}
    assert spread(Counter()) is None


# build: a server and tables


class Handler(BaseHTTPRequestHandler):
    """/good/N.png; /flaky/N.png fails twice; /missing; /slow; /short."""

    def do_GET(self) -> None:
        calls: Counter[str] = self.server.calls  # type: ignore[attr-defined]
        calls[self.path] += 1
        kind = self.path.split("/")[1]
        if kind == "slow":
            time.sleep(1.5)
        if kind == "missing" or (kind == "flaky" and calls[self.path] < 3):
            self.send_error(404 if kind == "missing" else 503)
            return
        content = plain(int(self.path.split("/")[2].split(".")[0])) if kind != "html" else b"<html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + (50 if kind == "short" else 0)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetching, "FIRST_PAUSE_S", 0.01)
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.handle_error = lambda *_: None  # clients that do not wait for the slow answer
    running.calls = Counter()  # type: ignore[attr-defined]
    running.base = f"http://127.0.0.1:{running.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def members_of(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def table_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".csv" | ".tsv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_urls_are_packed_in_order_and_failures_listed(data, server, tmp_path):
    kinds = ["good", "flaky", "missing", "good", "html", "short", "good"]
    rows = [{"URL": f"{server.base}/{kind}/{n}.png?a=ü b", "TEXT": f"caption {n}"} for n, kind in enumerate(kinds)]
    rows += [{"URL": "", "TEXT": "no address"}, {"URL": f"{server.base}/good/9.png", "TEXT": " "}]
    table = table_of(tmp_path / "t.csv", rows)
    options = ("--samples-per-shard", 4, "--retries", 2, "--json")
    status, out, _ = data("build", table, "--out", tmp_path / "out", *options)
    result = json.loads(out)
    assert status == 0
    assert (result["shards"], result["rows"], result["samples"]) == (3, 9, 4)
    assert result["failed"] == {
        "HTTP 404": 1,
        "unreadable picture": 1,
        "connection broke (short answer)": 1,
        "no picture named": 1,
        "no caption": 1,
    }
    assert [json.loads(x)["row"] for x in (tmp_path / "out/failed.jsonl").read_text().splitlines()] == [2, 4, 5, 7, 8]
    files = members_of(tmp_path / "out" / "00000.tar")
    assert list(files) == [f"{n:09d}.{e}" for n in (0, 1, 3) for e in ("json", "png", "txt")]
    assert files["000000003.png"] == plain(3), "original bytes"
    assert files["000000003.txt"] == b"caption 3"
    about = json.loads(files["000000003.json"])
    assert (about["captions"], about["width"], about["image"]) == (["caption 3"], 16, rows[3]["URL"])
    assert server.calls[next(path for path in server.calls if "flaky" in path)] == 3
    assert server.calls[next(path for path in server.calls if "missing" in path)] == 1, "a 404 is final"
    status, _, _ = data("build", table, "--out", tmp_path / "again", *options, "--workers", 1)
    assert content(tmp_path / "again") == content(tmp_path / "out"), "the same bytes with any number of workers"


def test_built_shards_are_what_a_run_reads(data, tmp_path):
    for n in range(5):
        (tmp_path / f"{n}.png").write_bytes(plain(n))
    table = table_of(tmp_path / "t.jsonl", [{"file": f"{n}.png", "captions": [f"a {n}", f"b {n}"]} for n in range(5)])
    assert data("build", table, "--out", tmp_path / "out", "--samples-per-shard", 3)[0] == 0
    wanted = Wanted(("txt", "json.captions"))
    found = survey(expand([str(tmp_path / "out")], "x"), wanted, tmp_path / "cache", "x")
    assert [(shard.samples, bool(shard.bad)) for shard in found] == [(3, False), (2, False)]
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"00000.tar": 3, "00001.tar": 2}
    indexed = survey(expand([str(tmp_path / "out")], "x"), Wanted(("txt",)), tmp_path / "new", "x")
    assert [(shard.samples, shard.source) for shard in indexed] == [(3, "from the index"), (2, "from the index")]
    assert [shard.identity for shard in indexed] == [shard.identity for shard in found]
    samples = [sample for shard in found for sample in read(shard, wanted)]
    assert [captions(sample, wanted.captions) for sample in samples] == [[f"a {n}", f"b {n}"] for n in range(5)]
    assert data("check", tmp_path / "out", "--workers", 1)[0] == 0


def test_a_build_continues_where_it_stopped(data, server, tmp_path):
    rows = [{"url": f"{server.base}/good/{n}.png", "caption": str(n)} for n in range(6)]
    table, out = table_of(tmp_path / "t.tsv", rows), tmp_path / "out"
    command = ("build", table, "--out", out, "--samples-per-shard", 2)
    assert data(*command)[0] == 0
    whole = content(out)
    (out / "00001_stats.json").unlink()
    (out / "00001.tar").write_bytes(b"half")
    (out / "00002.tar").unlink()
    server.calls.clear()
    assert data(*command)[0] == 0
    assert content(out) == whole
    assert sum(server.calls.values()) == 4, "finished shards are kept"
    assert not list(out.glob("*.tmp"))


STATS = [
    b"", b"{", b"[]", b"[" * 5000, b"9" * 9000, b"{}", b'{"rows": 2, "samples": "2", "bytes": 1, "failed": []}',
    b'{"rows": 1e999, "samples": 2, "bytes": 1, "failed": []}', b'{"rows": 2, "samples": 2, "bytes": 1, "failed": 7}',
    b'{"rows": 2, "samples": 1, "bytes": 1, "failed": [{}]}', b'{"rows": 2, "samples": 2, "bytes": -1, "failed": []}',
    b'{"rows": 2, "samples": 1, "bytes": 1, "failed": []}', b'{"rows": 3, "samples": 3, "bytes": 1, "failed": []}',
    b'{"count": 2, "successes": 2, "failed_to_download": 0}', b"\xff\xfe", None,
]  # fmt: skip


def test_a_shard_with_odd_statistics_is_packed_again(data, tmp_path, caplog):
    """What img2dataset writes under that name is of another kind."""
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(plain(n))
    table = table_of(tmp_path / "t.csv", [{"path": f"{n}.png", "caption": str(n)} for n in range(2)])
    out, arguments = tmp_path / "out", ("build", table, "--out", tmp_path / "out", "--json")
    first = json.loads(data(*arguments)[1])
    good = (out / "00000_stats.json").read_bytes()
    for odd in STATS:
        caplog.clear()
        (out / "00000_stats.json").unlink()
        (out / "00000.tar").write_bytes(b"other")
        (out / "00000_stats.json").mkdir() if odd is None else (out / "00000_stats.json").write_bytes(odd)
        status, said, _ = data(*arguments)
        assert (status, json.loads(said)) == (0, first), odd
        assert (out / "00000_stats.json").read_bytes() == good
        assert [m for m in caplog.messages if "00000_stats.json" in m], odd


def test_failed_rows_are_tried_again_on_request(data, server, tmp_path):
    rows = [{"url": f"{server.base}/{'flaky' if n == 3 else 'good'}/{n}.png", "caption": str(n)} for n in range(4)]
    command = ("build", table_of(tmp_path / "t.csv", rows), "--out", tmp_path / "out", "--samples-per-shard", 2)
    _, out, _ = data(*command, "--retries", 0)
    assert "1 of 4 rows failed, listed in failed.jsonl: 1 HTTP 503" in out
    server.calls.clear()
    assert "failed" in data(*command)[1], "kept as it is"
    assert not server.calls
    assert "4 pictures" in data(*command, "--retry-failed")[1]
    assert not (tmp_path / "out" / "failed.jsonl").read_text()


def test_no_picture_takes_much_memory_or_turns_white(data, tmp_path, monkeypatch):
    """What a run would refuse is not packed, and what is made smaller looks as it would in a run."""
    Image.new("L", (8000, 9000)).save(tmp_path / "huge.tif", compression="tiff_lzw")
    Image.fromarray(np.full((40, 60), 0x4000, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((40, 60), 0.5, np.float32)).save(tmp_path / "float.tif")
    noise = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "pieces.png")
    (tmp_path / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    names = ["huge.tif", "deep.png", "float.tif", "pieces.png", "program.eps"]
    table = table_of(tmp_path / "t.csv", [{"path": name, "caption": name} for name in names])
    monkeypatch.setattr(pixels, "MEMORY", 2**24)
    monkeypatch.setattr(pixels, "LARGE", 2500)
    assert data("build", table, "--out", tmp_path / "out", "--image-size", 24)[0] == 0
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert [(row["image"], row["reason"]) for row in failed] == [
        ("huge.tif", health.BOMB), ("float.tif", health.UNREADABLE), ("program.eps", health.UNREADABLE)
    ]  # fmt: skip
    files = members_of(tmp_path / "out" / "00000.tar")
    deep = np.array(Image.open(io.BytesIO(files["000000001.jpg"])))
    assert deep.shape == (24, 36, 3)
    assert abs(deep.astype(int) - 0x40).max() <= 1, "the upper bits of 16"
    whole = Image.fromarray(noise).resize((24, 29), Image.Resampling.BICUBIC)
    assert files["000000003.jpg"] == encode(whole, "jpeg", quality=95), "in pieces"


def test_pictures_shrink_and_other_formats_become_jpegs(data, tmp_path):
    Image.new("RGB", (100, 60), (200, 10, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / "b.webp")
    Image.new("RGBA", (30, 20), (200, 10, 10, 255)).save(tmp_path / "c.bmp")
    rows = [{"filepath": name, "title": name} for name in ("a.png", "b.webp", "c.bmp")]
    table = table_of(tmp_path / "t.tsv", rows)
    assert data("build", table, "--out", tmp_path / "out", "--image-size", 24)[0] == 0
    files = members_of(tmp_path / "out" / "00000.tar")
    assert Image.open(io.BytesIO(files["000000000.jpg"])).size == (40, 24)
    assert files["000000001.webp"] == (tmp_path / "b.webp").read_bytes(), "small ones are left alone"
    assert Image.open(io.BytesIO(files["000000002.jpg"])).format == "JPEG"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_named_columns_and_several_captions_in_every_format(tmp_path, suffix):
    rows = [{"id": 1, "where": " a,b.png ", "short": 'says "x"', "long": "y\tz" if suffix != "tsv" else "y"}]
    table = open_table(str(table_of(tmp_path / f"t.{suffix}", rows)), "where", ["short", "long", "short"])
    assert [entry[:2] for entry in table.entries()] == [("a,b.png", (rows[0]["short"], rows[0]["long"]))]


def test_usual_tables_are_recognised(tmp_path):
    cc3m = tmp_path / "cc3m.tsv"
    cc3m.write_text('a "quoted dog\thttp://x/1.jpg\nsecond\thttp://x/2.jpg\n')
    assert [e[:2] for e in open_table(str(cc3m)).entries()] == [
        ("http://x/1.jpg", ('a "quoted dog',)),
        ("http://x/2.jpg", ("second",)),
    ]
    open_clip = tmp_path / "open_clip.csv"
    open_clip.write_text("filepath\ttitle\na.jpg\ta, b\n")
    assert [e[:2] for e in open_table(str(open_clip)).entries()] == [("a.jpg", ("a, b",))]
    lists = tmp_path / "t.parquet"
    pq.write_table(pa.table({"Path": ["a", None], "Captions": [["x", "y"], None]}), lists)
    assert [e[:2] for e in open_table(str(lists)).entries()] == [("a", ("x", "y")), ("", ())]
    for name in ("CAPTION", "text", "Title"):
        assert open_table(str(table_of(tmp_path / "c.csv", [{"IMAGE": "a", name: "b"}]))).captions == (name,)


BAD_TABLES = {
    "no such file": ("none.csv", None, []),
    "another ending": ("t.xlsx", b"x", []),
    "no known columns": ("t.csv", b"a,b\n1,2\n", []),
    "a column that is not there": ("t.csv", b"url,caption\n1,2\n", ["--caption-column", "captoin"]),
    "no rows": ("t.csv", b"url,caption\n", []),
    "not UTF-8": ("t.csv", b"url,caption\nx,\xff\n", []),
    "no JSON": ("t.jsonl", b'{"url": "a", "caption": "b"}\n{\n', []),
    "pictures in the table": ("t.jsonl", b'{"image": {"bytes": "a"}, "caption": "b"}\n', ["--image-column", "image"]),
    "no parquet": ("t.parquet", b"PAR1", []),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_wrong_table_is_status_2_and_leaves_no_folder(data, tmp_path, case):
    name, text, options = BAD_TABLES[case]
    if text is not None:
        (tmp_path / name).write_bytes(text)
    status, out, err = data("build", tmp_path / name, "--out", tmp_path / "out", *options)
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    if "captoin" in options:
        assert "did you mean caption?" in err


def test_a_foreign_folder_is_refused(data, tmp_path):
    (tmp_path / "a.png").write_bytes(plain(1))
    table = table_of(tmp_path / "t.csv", [{"path": "a.png", "caption": "a"}])
    foreign = tmp_path / "out"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    for out, options in ((foreign, []), (foreign / "notes.txt", []), ("s3://bucket/x", [])):
        status, _, err = data("build", table, "--out", out, *options)
        assert status == 2
        assert err.startswith("raychain: --out")
    assert data("build", table, "--out", tmp_path / "new")[0] == 0
    status, _, err = data("build", table, "--out", tmp_path / "new", "--image-size", 99)
    assert status == 2
    assert "image_size" in err


def test_nothing_packed_is_status_1(data, tmp_path):
    table = table_of(tmp_path / "t.csv", [{"path": "gone.png", "caption": "a"}])
    status, out, err = data("build", table, "--out", tmp_path / "out")
    assert status == 1
    assert "1 no such file" in out
    assert "--retry-failed" in err


def test_downloads_have_time_limits_and_say_what_went_wrong(server, tmp_path):
    limits = {"timeout_s": 0.2, "retries": 0}
    for url, reason in {
        f"{server.base}/slow/1.png": "timed out",
        "http://127.0.0.1:1/x.png": "no connection",
        "http://[broken/x.png": "no valid URL",
        "what://x/y.png": "cannot be read from storage",
        "x.png": "no such file",
    }.items():
        with pytest.raises(FetchError, match=reason):
            fetch(url, str(tmp_path), **limits)


def test_relative_paths_start_at_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table_of(tmp_path / "t.csv", [{"path": "a.png", "caption": "a"}])
    assert open_table("t.csv").folder == "."
    assert open_table(str(tmp_path / "t.csv")).folder == str(tmp_path)
    with pytest.raises(InputError):
        open_table("u.csv")
