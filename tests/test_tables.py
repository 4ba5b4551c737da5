"""Tables as people have them and as nobody should: no row is swallowed, nothing is waited for, all is counted."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_feed import plain

from raychain.dataprep import fetch as fetching
from raychain.dataprep import rows as reading
from raychain.dataprep.build import Options, build
from raychain.dataprep.fetch import FetchError, fetch
from raychain.dataprep.table import Entry, open_table
from raychain.errors import InputError

CELLS = st.text(st.sampled_from("ab ,\"'\t\n\r;é.j"), max_size=8)
NAMES = st.integers(0, 99).map(lambda n: f"{n}.jpg")


def entries(path: Path, content: str | bytes) -> list[Entry]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(open_table(str(path)).entries())


def refused(path: Path, content: str | bytes) -> str:
    """The message that a table with this content is answered with."""
    with pytest.raises(InputError) as caught:
        entries(path, content)
    return str(caught.value)


def written(rows: list[tuple[str, str]], delimiter: str, quoting: int = csv.QUOTE_MINIMAL, end: str = "\n") -> str:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows([("path", "caption"), *rows])
    return file.getvalue()


@given(st.lists(st.tuples(NAMES, CELLS), min_size=1, max_size=8), st.sampled_from([",", "\t"]), st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_csv_writes_is_read_back(tmp_path: Path, rows: list[tuple[str, str]], delimiter: str, every: bool) -> None:
    if delimiter == "\t" and not every:  # a line with a cell for each column is a row
        rows = [(name, caption.replace("\t", " ")) for name, caption in rows]
    text = written(rows, delimiter, csv.QUOTE_ALL if every else csv.QUOTE_MINIMAL, "\r\n")
    found = entries(tmp_path / ("t.csv" if delimiter == "," else "t.tsv"), text)
    expected = [(name, (caption.strip(),) if caption.strip() else ()) for name, caption in rows]
    assert [entry[:2] for entry in found] == expected
    assert sum(entry.lines for entry in found) == len(io.StringIO(text, newline="").readlines()) - 1
    assert not any(entry.problem for entry in found)


@given(
    st.lists(st.tuples(NAMES, CELLS), min_size=2, max_size=8),
    st.sampled_from([",", "\t"]),
    st.sampled_from(['"', ",", "\t", "\n", "\r", "\0", ""]),
    st.floats(0, 1),
)
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_row_of_a_damaged_table_is_swallowed(
    tmp_path: Path, rows: list[tuple[str, str]], delimiter: str, damage: str, place: float
) -> None:
    """A character is put in or, where it is none, taken away: no row is in another's caption, or all is refused."""
    rows = [(f"{n}-{name}", caption) for n, (name, caption) in enumerate(rows)]
    text = written(rows, delimiter)
    start = text.index("\n") + 1
    at = start + round(place * (len(text) - start))
    text = text[:at] + damage + text[at + (not damage) :]
    try:
        found = entries(tmp_path / ("t.csv" if delimiter == "," else "t.tsv"), text)
    except InputError as error:
        if "line" not in str(error):
            raise
        return
    lines = len([line for line in io.StringIO(text, newline="").readlines() if line.strip("\r\n")]) - 1
    assert lines - 1 <= sum(entry.lines for entry in found) <= lines + 20
    for entry in found:
        for caption in entry.captions:
            inside = [name for name, _ in rows if f"\n{name}{delimiter}" in caption]
            assert not inside, "a row in another's caption"


@given(st.lists(st.tuples(NAMES, st.text(st.sampled_from("ab \"'é"), max_size=6)), min_size=1, max_size=9))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tsv_that_was_written_without_quoting_has_a_row_a_line(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    found = entries(tmp_path / "t.tsv", "path\tcaption\n" + "".join(f"{name}\t{text}\n" for name, text in rows))
    assert [entry.image for entry in found] == [name for name, _ in rows]
    assert all(entry.lines == 1 and not entry.problem for entry in found)


def test_quotes_of_a_tsv_are_text_unless_all_enclose_their_cells(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    head = "path\tcaption\n"
    assert [e.captions for e in entries(path, head + 'a.jpg\t"A ""b"""\nb.jpg\tc\n')] == [('A "b"',), ("c",)]
    assert [e.captions for e in entries(path, head + 'a.jpg\t"A" b\nb.jpg\t"c"\n')] == [('"A" b',), ('"c"',)]
    assert [e.captions for e in entries(path, head + 'a.jpg\tx\nb.jpg\t"c\n')] == [("x",), ('"c',)]
    spanning = entries(path, head + 'a.jpg\t"one\ntwo three"\nb.jpg\tc\n')
    assert [(e.captions, e.lines) for e in spanning] == [(("one\ntwo three",), 2), (("c",), 1)]
    one_ragged = entries(path, head + 'a.jpg\t"A ""b"""\nragged\nb.jpg\tc\n')
    assert [(e.captions, e.problem) for e in one_ragged] == [
        (('A "b"',), ""),
        ((), "1 cells in a table of 2 columns"),
        (("c",), ""),
    ]


def test_a_quote_of_a_csv_that_takes_in_other_rows_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    said = refused(path, 'path,caption\na.jpg,A\nb.jpg,"The Big\nc.jpg,C\nd.jpg,a 5"\ne.jpg,E\n')
    assert "line 2" in said
    assert "line 5" in said
    assert "c.jpg,C" in said
    assert "line 3" in refused(path, 'path,caption\na.jpg,A\nb.jpg,"The Big\nc.jpg,C\n')
    assert "line 2 to 3" in refused(path, 'path,caption\na.jpg,"A\nb.jpg,"B"\n')
    assert "line 2" in refused(path, 'path,caption\na.jpg,"A" b\n')
    kept = entries(path, 'path,caption\na.jpg,"One, two,\nthree and ""four"""\nb.jpg,B\n')
    assert [(e.captions[0], e.lines) for e in kept] == [('One, two,\nthree and "four"', 2), ("B", 1)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "tsv.gz"])
def test_line_ends_and_byte_order_marks(tmp_path: Path, end: str, encoding: str, suffix: str) -> None:
    delimiter = "," if suffix == "csv" else "\t"
    text = end.join([f"path{delimiter}caption", f"a.jpg{delimiter}Ü", f"b.jpg{delimiter}b", "", ""]).encode(encoding)
    found = entries(tmp_path / f"t.{suffix}", gzip.compress(text) if suffix.endswith("gz") else text)
    assert [entry[:2] for entry in found] == [("a.jpg", ("Ü",)), ("b.jpg", ("b",))]


def test_rows_that_have_not_a_cell_a_column_are_failed_rows(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"{n}.jpg").write_bytes(plain(n))
    (tmp_path / "t.csv").write_text("path,caption,id\n0.jpg,a,1\n1.jpg,a, b,2\n2.jpg\n0.jpg,a\0,1\n0.jpg,a,1,,\n")
    result = build(open_table(str(tmp_path / "t.csv")), str(tmp_path / "out"), Options(workers=2))
    assert (result["rows"], result["lines"], result["samples"]) == (5, 5, 2)
    assert result["failed"] == {
        "4 cells in a table of 3 columns": 1,
        "1 cells in a table of 3 columns": 1,
        "a NUL character": 1,
    }


BAD = {
    "two columns of a name": ("t.csv", "path,caption,caption\na,b,c\n", "2 columns caption"),
    "latin-1": ("t.csv", "path,caption\na,b\nc,d\xe9\n".encode("latin-1"), "line 3 is not UTF-8"),
    "half a character": ("t.jsonl", b'{"path": "a", "caption": "b"}\n{"path": "\xc3', "line 2 is not UTF-8"),
    "half of UTF-16": ("t.csv", "path,caption\na,b\n".encode("utf-16")[:-1], "utf-16"),
    "nothing": ("t.csv", "", "at least one row"),
    "blank lines": ("t.tsv", "\n\n\r\n", "at least one row"),
    "a header": ("t.tsv", "path\tcaption\n", "at least one row"),
    "no gzip": ("t.csv.gz", "path,caption\na,b\n", "t.csv.gz"),
    "half a gzip": ("t.csv.gz", gzip.compress(b"path,caption\n" + os.urandom(9999).hex().encode())[:-500], "t.csv.gz"),
    "a list": ("t.jsonl", '{"path": "a", "caption": "b"}\n[1]\n', "line 2 is no JSON object"),
    "a key twice": ("t.jsonl", '{"path": "a", "caption": "b", "path": "c"}\n', "line 1: the key 'path' stands twice"),
    "deep JSON": ("t.jsonl", "[" * 200_000, "line 1 is nested too deeply"),
    "a long number": ("t.jsonl", '{"path": ' + "9" * 9999 + "}", "line 1"),
    "no parquet": ("t.parquet", "path,caption\n", "t.parquet"),
    "half a parquet": ("t.parquet", b"PAR1" + b"\0" * 500 + b"PAR1", "t.parquet"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_table_that_cannot_be_read_is_one_message_that_says_where(tmp_path: Path, case: str) -> None:
    name, content, expected = BAD[case]
    assert expected in refused(tmp_path / name, content)


def test_odd_values_are_rows_without_a_picture_or_caption(tmp_path: Path) -> None:
    rows = ['{"path": "a", "caption": NaN}', '{"path": null, "caption": "b"}', '{"path": 3, "caption": ["x", 4, null]}']
    found = entries(tmp_path / "t.jsonl", "\n".join(['{"path": "a", "caption": "b", "z": {"q": 1, "q": 2}}', *rows]))
    assert [entry[:2] for entry in found] == [("a", ("b",)), ("a", ()), ("", ("b",)), ("", ("x",))]
    pq.write_table(pa.table({"path": ["a"], "caption": ["b"], "when": [2**62]}), tmp_path / "t.parquet")
    assert [entry[:2] for entry in open_table(str(tmp_path / "t.parquet")).entries()] == [("a", ("b",))]


def test_lines_and_cells_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST", 1000)
    path = tmp_path / "t.csv.gz"
    assert "line 2 has more than" in refused(path, gzip.compress(b"path,caption\n" + b"x" * 5000))
    assert "line 2" in refused(path, gzip.compress(b'path,caption\na,"' + b"x\n" * 5000))
    assert "line 1 has more than" in refused(path, gzip.compress(b"\0" * 10**6))


def test_a_table_that_is_a_pipe_a_folder_or_a_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "zero.tsv").symlink_to("/dev/zero")
    for name, kind in {"pipe.csv": "a pipe", "folder.jsonl": "a folder", "zero.tsv": "a device"}.items():
        with pytest.raises(InputError, match=f"{kind}, not a file"):
            open_table(str(tmp_path / name))


def test_pictures_that_are_no_files_are_failed_rows_and_nothing_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "good.png").write_bytes(plain(1))
    (tmp_path / "empty").touch()
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    reasons = {
        "pipe": "a pipe, not a file",
        "folder": "a folder, not a file",
        "socket": "a socket, not a file",
        "sparse": "larger than 64 MiB",
        "/dev/zero": "a device, not a file",
        "file:///dev/zero": "a device, not a file",
        "local:///dev/zero": "a device, not a file",
        f"local://{tmp_path}/pipe": "a pipe, not a file",
        "/proc/self/mem": "empty picture",
        "/proc/kmsg": "empty picture",
        "empty": "empty picture",
        "~nosuchuser/x.png": "no such file",
        "x" * 5000: "name too long",
        "simplecache::local:///dev/zero": "address",
        "zip://x.jpg::local:///dev/zero": "address",
        "good.png": "",
    }  # fmt: skip
    rows = [(name, "caption") for name in reasons]
    (tmp_path / "t.csv").write_text(written(rows, ","))
    started = time.monotonic()
    result = build(open_table(str(tmp_path / "t.csv")), str(tmp_path / "out"), Options(workers=4))
    assert time.monotonic() - started < 60
    failed = {row["image"]: row["reason"] for row in map(json.loads, (tmp_path / "out/failed.jsonl").open())}
    for name, reason in reasons.items():
        assert reason.lower() in failed.pop(name, "").lower(), name
    assert not failed
    assert (result["rows"], result["samples"]) == (len(reasons), 1)


Reply = Callable[[socket.socket], None]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Reply], str]]:
    """Starts servers that answer each request as told."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetching, "FIRST_PAUSE_S", 0.01)
    over, listeners = threading.Event(), []

    def start(reply: Reply) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def work() -> None:
            while not over.is_set():
                with suppress(OSError):
                    client, _ = listener.accept()
                    client.recv(2**16)
                    with client:
                        reply(client)

        threading.Thread(target=work, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/x.jpg"

    yield start
    over.set()
    for listener in listeners:
        listener.close()


def slowly(text: bytes) -> Reply:
    def reply(client: socket.socket) -> None:
        for byte in text:
            client.sendall(bytes([byte]))
            time.sleep(0.05)

    return reply


def endless(head: bytes) -> Reply:
    def reply(client: socket.socket) -> None:
        client.sendall(head)
        while True:
            client.sendall(b"x" * 2**20)

    return reply


def redirect(to: str) -> Reply:
    return lambda client: client.sendall(f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode())


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (endless(b"HTTP/1.1 200 OK\r\n\r\n"), "larger than 64 MiB"),
        (endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n"), "larger than 64 MiB"),
        (endless(b"HTTP/1.1 200 OK\r\nX: "), "connection broke"),
        (endless(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"), "larger than 64 MiB"),
        (slowly(b"HTTP/1.1 200 OK\r\n" * 99), "too slow"),
        (slowly(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 999), "too slow"),
        (redirect("file:///etc/passwd"), "HTTP 302"),
        (redirect("ftp://127.0.0.1/x"), "no web address"),
        (redirect("/x.jpg"), "HTTP 302"),
        (redirect("//[broken"), "no valid URL"),
        (lambda client: client.sendall(b"\x1b[2J\r\n\r\n"), "connection broke"),
        (lambda client: client.sendall(b"HTTP/1.1 503 X\r\nRetry-After: " + b"9" * 5000 + b"\r\n\r\n"), "HTTP 503"),
        (lambda client: time.sleep(1), "timed out"),
    ],
)  # fmt: skip
def test_no_server_is_waited_for_or_read_without_bound(
    serve: Callable[[Reply], str], tmp_path: Path, reply: Reply, reason: str
) -> None:
    started = time.monotonic()
    with pytest.raises(FetchError, match=reason):
        fetch(serve(reply), str(tmp_path), timeout_s=0.3, retries=0)
    assert time.monotonic() - started < 30
