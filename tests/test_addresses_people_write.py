"""Addresses as webdataset's and open_clip's users write them: commands, `::`, the web, Hugging Face."""

from __future__ import annotations

import http.server
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from test_feed import READER, WANTED, sample, write
from typer.testing import CliRunner

from raychain.cli.data import data
from raychain.cli.run import run_command
from raychain.config.loading import validate
from raychain.core.storage import is_local, resolve
from raychain.data.addresses import expand, is_pattern
from raychain.data.cache import ShardCache
from raychain.data.commands import unexecuted
from raychain.data.content import ChangedError
from raychain.data.index import FROM_SIZES, FROM_STATS, READ
from raychain.data.shards import survey
from raychain.errors import InputError
from raychain.evaluators.finding import find_tasks
from raychain.runs.resolve import make_task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of four and three samples."""
    for name, numbers in (("0", range(4)), ("1", range(4, 7))):
        write(tmp_path / f"{name}.tar", [sample(n) for n in numbers])
    (tmp_path / "counts").mkdir()
    return tmp_path


def tree(folder: Path, train: Any, **more: Any) -> dict[str, Any]:
    return {
        "name": "written",
        "data": {"train": train, "captions": {"keys": ["txt"]}, **more},
        "chain": [{"model": "CoM-micro-S", "epochs": "10 steps"}],
        "train": {"global_batch": 4, "warmup": "10 %"},
        "preload": {"cache": str(folder / "cache")},
        "storage": str(folder / "runs"),
    }


def command(folder: Path) -> tuple[str, Callable[[], int]]:
    """A command that prints the shards, and how often it has run."""
    log = folder / "ran"
    text = f"pipe:cat {shlex.quote(str(folder))}/{{0..1}}.tar; echo >> {shlex.quote(str(log))}"
    return text, lambda: len(log.read_text()) if log.exists() else 0


def test_commands_are_shards_which_run_to_be_counted_and_decoded(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text, ran = command(folder)
    with caplog.at_level("WARNING"):
        task = make_task(validate(tree(folder, text)), str(folder / "out"))
    assert "data.train runs commands of this experiment" in caplog.text
    assert [shard.samples for shard in task.shards] == [4, 3]
    assert ran() == 2
    copied = survey([f"{folder}/0.tar"], WANTED, folder, "x")
    assert task.shards[0].identity == copied[0].identity, "what is printed is what a file would be"
    assert make_task(validate(tree(folder, text)), str(folder / "out")).stages[0].key == task.stages[0].key
    assert ran() == 2, "noted"
    files = make_task(validate(tree(folder, str(folder / "[01].tar"))), str(folder / "out"))
    assert files.stages[0].key == task.stages[0].key
    table = ShardCache(folder / "decoded", 2**30).table(task.shards[1], READER)
    assert table.tokens[::3, 0].tolist() == [4, 5, 6]
    write(folder / "1.tar", [sample(n) for n in (4, 5, 9)])
    with pytest.raises(ChangedError, match=r"no longer prints what it did.*counts"):
        ShardCache(folder / "again", 2**30).table(task.shards[1], READER)


def test_a_dry_run_runs_no_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, ran = command(folder)
    file = folder / "written.yaml"
    for samples, train in ((7, text), (None, text), (7, [{"shards": text, "weight": 2}])):
        file.write_text(yaml.safe_dump(tree(folder, train, **({"samples": samples} if samples else {}))))
        if samples:
            run_command(str(file), dry_run=True)
            assert "10 steps" in capsys.readouterr().out
        else:
            with pytest.raises(InputError, match=r"^data\.train\n  given    pipe:(?s:.*)give data\.samples"):
                run_command(str(file), dry_run=True)
    assert ran() == 0
    make_task(validate(tree(folder, text)), str(folder / "out"))
    run_command(str(file), dry_run=True, as_json=True)
    assert '"counted before": 2' in capsys.readouterr().out
    assert ran() == 2


def test_commands_stand_in_the_experiment_alone(folder: Path) -> None:
    text, ran = command(folder)
    with pytest.raises(InputError, match=r"given    pipe:cat .*0\.\.1"):
        expand([text], "x")
    for refused in ("pipe:", "pipe: "):
        with pytest.raises(InputError):
            expand([refused], "x", commands=True)
    with pytest.raises(InputError):
        find_tasks(text, ["txt"], folder, "evaluate.retrieval")
    with pytest.raises(InputError):
        validate(tree(folder, text) | {"storage": text}) and resolve(text)
    failed = "pipe:cat no-such-file.tar"
    with pytest.raises(InputError, match=r"cat no-such-file\.tar failed"):
        make_task(validate(tree(folder, failed)), str(folder / "out"))
    assert CliRunner().invoke(data, ["check", text, "--captions", "txt", "--workers", "1"]).exit_code == 0
    assert ran() == 2
    assert CliRunner().invoke(data, ["index", text]).exception
    assert ran() == 2
    with unexecuted(), pytest.raises(InputError, match="no command is run here"):
        make_task(validate(tree(folder, text)), str(folder / "out"))


def test_sources_are_written_as_in_open_clip(folder: Path) -> None:
    a, b = f"{folder}/0.tar", f"{folder}/{{1..1}}.tar"
    assert expand([f"{a}::{b}"], "x") == [a, f"{folder}/1.tar"]
    assert is_pattern(f"{a}::{b}")
    both = validate(tree(folder, {"shards": f"{a}::{b}", "weights": [1, 2]}))
    assert both.data.train == validate(tree(folder, [a, {"shards": b, "weight": 2}])).data.train
    assert both.data.train == validate(tree(folder, {"shards": [a, b], "weights": "1::2"})).data.train
    assert validate(both.model_dump(mode="json")) == both
    key = make_task(both, str(folder / "out")).stages[0].key
    assert key != make_task(validate(tree(folder, f"{a}::{b}")), str(folder / "out")).stages[0].key
    (folder / "x::y").mkdir()
    write(folder / "x::y" / "2.tar", [sample(1)])
    assert expand([f"{folder}/x::y"], "x") == [f"{folder}/x::y/2.tar"], "a path that exists is that"


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], "1::2::3", 1, [], [1, 0], ["a", 1], None])
def test_weights_that_fit_no_sources_are_refused(folder: Path, weights: Any) -> None:
    with pytest.raises(InputError, match=r"^experiment: data\.train"):
        validate(tree(folder, {"shards": "a::b", "weights": weights}))
    with pytest.raises(InputError, match=r"^experiment: data\.train"):
        validate(tree(folder, {"shards": "a::b", "weights": [1, 2], "weight": 2}))


class Web(http.server.SimpleHTTPRequestHandler):
    """Files with ranges and ETags, as object stores and CDNs serve them; asks for a token where one is in the folder's
    name."""

    asked: list[str]
    sent: int

    def do_GET(self) -> None:
        self._answer(True)

    def do_HEAD(self) -> None:
        self._answer(False)

    def _answer(self, body: bool) -> None:
        name, _, query = self.path.partition("?")
        path = Path(self.directory, name.lstrip("/"))
        type(self).asked.append(f"{self.command} {self.path}")
        if not path.is_file() or ("token" in name and query != "token=a%2Fb"):
            self.send_error(404 if not path.is_file() else 403)
            return
        content, part = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = (int(part[1]), int(part[2] or len(content) - 1) + 1) if part else (0, len(content))
        self.send_response(206 if part else 200)
        if part:
            self.send_header("Content-Range", f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(content)}"')
        self.send_header("Content-Length", str(len(content[start:stop])))
        self.end_headers()
        if body:
            type(self).sent += len(content[start:stop])
            self.wfile.write(content[start:stop])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(folder: Path) -> Iterator[str]:
    """The folder on the web."""
    Web.asked, Web.sent = [], 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Web(*a, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_shards_on_the_web_are_counted_and_decoded(folder: Path, web: str) -> None:
    names = expand([f"{web}/{{0..1}}.tar"], "x")
    assert names == [f"{web}/0.tar", f"{web}/1.tar"]
    found = survey(names, WANTED, folder, "x")
    assert [(shard.samples, shard.source) for shard in found] == [(4, READ), (3, READ)]
    table = ShardCache(folder / "decoded", 2**30).table(found[1], READER)
    assert table.tokens[::3, 0].tolist() == [4, 5, 6]
    write(folder / "1.tar", [sample(n) for n in (4, 5, 9)])
    with pytest.raises(OSError, match="has changed since it was counted"):
        ShardCache(folder / "again", 2**30).table(found[1], READER)


def test_addresses_on_the_web_keep_what_signs_them(folder: Path, web: str) -> None:
    (folder / "token").mkdir()
    write(folder / "token" / "2.tar", [sample(1)])
    signed = f"{web}/token/2.tar?token=a%2Fb"
    assert expand([signed], "x") == [signed]
    assert not is_pattern(signed)
    assert [shard.samples for shard in survey([signed], WANTED, folder, "x")] == [1]


def test_what_the_web_does_not_have_is_refused(folder: Path, web: str) -> None:
    for address, said in ((f"{web}/*.tar", "braces"), (f"{web}/", "braces"), (f"{web}/7.tar", "no such file")):
        with pytest.raises(InputError, match=f"^x\n.*(?s:.*){said}"):
            expand([address], "x")


def test_counts_beside_shards_on_the_web_spare_reading_them(folder: Path, web: str) -> None:
    (folder / "sizes.json").write_text('{"0.tar": 4}')
    (folder / "1_stats.json").write_text('{"successes": 3}')
    found = survey([f"{web}/{n}.tar" for n in range(2)], WANTED, folder, "x")
    assert [(shard.samples, shard.source) for shard in found] == [(4, FROM_SIZES), (3, FROM_STATS)]
    assert Web.sent < 100, "not the shards"


class Hub(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
    """What huggingface_hub's filesystem tells of a file: its blob's hash."""

    protocol = "hf"
    store: dict[str, Any] = {}  # noqa: RUF012 - memory's own

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("hf://").strip("/")

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return super().info(path) | {"blob_id": "ab12"}


def test_shards_on_hugging_face_go_through_its_filesystem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("hf", Hub, clobber=True)
    try:
        Hub().pipe("datasets/me/set/0.tar", (folder / "0.tar").read_bytes())
        address = "hf://datasets/me/set/0.tar"
        assert not is_local(address)
        assert expand(["hf://datasets/me/set/*.tar"], "x") == [address]
        [shard] = survey([address], WANTED, folder, "x")
        assert shard.samples == 4
    finally:
        fsspec.register_implementation("hf", "huggingface_hub.HfFileSystem", clobber=True)


def test_hugging_face_without_its_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem  # noqa: B018
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, "hf", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"install its fsspec driver \(.*huggingface_hub"):
        expand(["hf://datasets/me/set/0.tar"], "data.train")
