"""Object storage that does not answer is named soon and given up; addresses that are none are one message."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from raychain.core import storage
from raychain.core.storage import Folder, answered, local_path, resolve
from raychain.data import fetch
from raychain.data.addresses import expand
from raychain.errors import InputError, without_secrets
from raychain.terminal import counting
from raychain.terminal.counting import CountingLine

S3 = "s3://key:secret@bucket/a?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{}"
GS = "gs://anonymous@bucket/a?scheme=http&endpoint_override=127.0.0.1:{}"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for little."""
    monkeypatch.setattr(storage, "WORD_S", 0.2)
    monkeypatch.setattr(storage, "ANSWER_S", 1.0)
    monkeypatch.setattr(storage, "ASKED_S", (0.01, 0.01))
    monkeypatch.setattr(fetch, "PAUSE_S", 0.01)
    monkeypatch.setattr(fetch.patiently, "__defaults__", (1.0,))


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("scheme", [S3, GS])
def test_storage_that_says_nothing_is_named_and_given_up(
    hasty: None, silent: int, scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    address, started = scheme.format(silent), time.monotonic()
    with pytest.raises(InputError, match="gave up after 5 tries: no answer within 1 s"):
        expand([address], "SHARDS")
    assert time.monotonic() - started < 30
    shown = without_secrets(address)
    assert f"waiting for {shown}, try 1 of 5" in caplog.text
    assert f"waiting for {shown}, try 5 of 5" in caplog.text
    if scheme == GS:  # what S3 has under way is waited for when its filesystem goes
        folder = Folder(address)
        for ask in (lambda: folder.read("x"), folder.list, lambda: folder.write("x", b"")):
            with pytest.raises(OSError, match="gave up after 3 tries"):
                ask()


def test_a_closed_port_of_google_is_not_asked_for_a_quarter_of_an_hour(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fetch, "PAUSE_S", 0.01)
    with pytest.raises(InputError, match="gave up after 5 tries: google"):
        expand([GS.format(9)], "SHARDS")
    assert "try 1 of 5 failed" in caplog.text


def test_an_answer_in_time_is_given_and_its_error_raised() -> None:
    assert answered(lambda: 3, "x", 5) == 3
    with pytest.raises(FileNotFoundError):
        answered(lambda: Path("/none").read_bytes(), "x", 5)
    with pytest.raises(ZeroDivisionError):
        answered(lambda: 1 / 0, "x", 5)
    with pytest.raises(OSError, match="ArrowInvalid"):
        answered(lambda: fs.FileSystem.from_uri("gs://bucket/?what=1"), "x", 5)


def test_a_read_that_was_given_up_does_not_disturb_the_next(
    hasty: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first read sleeps over its limit and then ends, beside those that follow."""
    content = os.urandom(10**5)
    (tmp_path / "x").write_bytes(content)
    slept = threading.Event()

    class Slow:
        """A file whose first read is slow."""

        def __init__(self, file: Any) -> None:
            self.file = file
            self.size, self.close = file.size, file.close

        def read_at(self, size: int, place: int) -> bytes:
            if not slept.is_set():
                slept.set()
                time.sleep(1.5)
            return self.file.read_at(size, place)

    class Store(fs.LocalFileSystem):
        def open_input_file(self, path: str) -> Slow:
            return Slow(super().open_input_file(path))

    monkeypatch.setattr(fetch, "resolve", lambda address: (Store(), address.removeprefix("slow://")))
    monkeypatch.setattr(fetch, "TRANSFER_S", 1.0)
    with fetch.open_input(f"slow://{tmp_path}/x", 1000) as file:
        assert file.read() == content
        file.seek(5)
        assert file.read(9) == content[5:14]
    assert slept.is_set()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://bucket/x?region=us-east-1&what=1", "what"),
        ("gs://bucket/x?what=1", "what"),
        ("s3://", "name the bucket"),
        ("gs://", "name the bucket"),
        ("s3:///x?region=us-east-1", "bucket"),
        ("s3://bucket/a b?region=us-east-1", "address"),
        ("s3://[/x?region=us-east-1", "address"),
        ("nosuch://bucket/x", "nosuch"),
        ("://x", "one address"),
        ("zip://a::/dev/zero", "one address"),
        ("~nosuchuser/x", "no ~nosuchuser"),
    ],
)
def test_an_address_that_is_none_is_one_message(address: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(address)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 4


def test_the_home_of_nobody_is_named_wherever_it_is_given() -> None:
    for where, given in (("--out", "~nosuchuser"), ("preload.cache", Path("~nosuchuser/a/b"))):
        with pytest.raises(InputError, match=f"{where}(.|\n)*there is no ~nosuchuser"):
            local_path(given, where)
    assert local_path("~/a", "x") == Path.home() / "a"
    assert local_path("./~nosuchuser", "x") == Path("~nosuchuser")


def test_local_addresses_of_every_form_are_local() -> None:
    for address in ("/dev/zero", "file:///dev/zero", "local:///dev/zero"):
        filesystem, path = resolve(address)
        assert isinstance(filesystem, fs.LocalFileSystem)
        assert path == "/dev/zero"


def test_a_pipe_in_place_of_a_shard_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(OSError, match="a pipe, not a file"):
        fetch.open_input(str(tmp_path / "x"))


def test_a_count_that_stands_still_is_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(counting, "SILENT_S", 0.05)
    with CountingLine("rows") as line:
        time.sleep(0.3)
        line.show(3, 9)
        time.sleep(0.3)
    said = capsys.readouterr().err
    time.sleep(0.2)
    assert not capsys.readouterr().err
    assert "rows: none yet (0:00)" in said
    assert "rows: 3 of 9 (0:0" in said


def test_waiting_is_said_in_a_process_without_logging() -> None:
    script = "import time; from raychain.core import storage; storage.WORD_S = 0.1\n"
    script += "storage.answered(lambda: time.sleep(0.5), 'the moon', 5)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == "waiting for the moon\n"
    assert logging.getLogger("raychain").handlers
