"""A run whose disk fills up, or whose object storage stalls: training goes on, nothing is lost, the log says so."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml

from raychain.core.storage import Folder, resolve

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("making a small file system needs the right to mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def start(tree: dict, folder: Path, *options: str) -> subprocess.Popen[str]:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "raychain.run", str(file), "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.long
def test_a_disk_that_is_full_for_a_while_costs_nothing_but_checkpoints(tree, small_disk, tmp_path):
    tree |= {"storage": str(small_disk / "runs"), "evaluate": {}, "checkpoint": {"every": "5 steps"}}
    tree["chain"] = [{"model": "CoM-micro-S", "epochs": "150 steps"}, {"model": "CoM-micro-M", "epochs": "16 steps"}]
    tree["train"]["log_every"] = 1
    out = small_disk / "runs" / "tiny"
    process = start(tree, tmp_path)
    until(lambda: list(out.glob("checkpoints/*/*/state.json")), process)
    with (small_disk / "filler").open("wb") as filler:
        try:
            while filler.write(b"0" * 2**20):
                filler.flush()
        except OSError:
            pass
    time.sleep(8)  # long enough for the first stage to end: its publication is tried again
    (small_disk / "filler").unlink()
    answer, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    run = json.loads(answer)
    assert [stage["status"] for stage in run["stages"]] == ["trained", "trained"]
    assert run["restarts"] == []
    assert "No space left on device" in errors
    steps = [(x["stage"], x["step"]) for x in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]
    assert steps == [(0, n) for n in range(1, 151)] + [(1, n) for n in range(1, 17)]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.long
def test_a_store_that_cannot_be_written_is_named_and_costs_no_stage(tree, small_disk, tmp_path, when):
    tree |= {"storage": str(small_disk / "runs"), "evaluate": {}}
    tree["chain"][0]["epochs"] = "200 steps"
    out = tmp_path / "out"
    change = ["mount", "-o", "remount,ro", str(small_disk)]
    if when == "before":
        subprocess.run(change, check=True)
        process = start(tree, tmp_path, "--out", str(out))
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2, errors
        assert "storage" in errors
        assert "Read-only file system" in errors
        return
    process = start(tree, tmp_path, "--out", str(out))
    until(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size, process)
    subprocess.run(change, check=True)
    answer, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert [stage["status"] for stage in json.loads(answer)["stages"]] == ["trained", "trained"]
    assert "is not shared through" in errors
    assert "Read-only file system" in errors
    assert "Traceback" not in errors
    assert len(list(out.glob("stages/*/stage.json"))) == 2


class Line:
    """A TCP line to `target` that can be made to stall."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target, self.free = target, threading.Event()
        self.free.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self.target)
            except OSError:
                return
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(2**16):
                self.free.wait()
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            end.close()


@pytest.mark.long
def test_object_storage_that_stalls_for_30_seconds_does_not_stop_training(tree, tmp_path, monkeypatch):
    port = _free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port)
        line = Line(("127.0.0.1", port))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "none")
        endpoint = quote(f"127.0.0.1:{line.port}")
        query = f"endpoint_override={endpoint}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        filesystem, path = resolve(f"s3://bucket?{query}")
        filesystem.create_dir(path)
        tree |= {"evaluate": {}, "checkpoint": {"every": "2 seconds"}}
        tree["chain"] = [{"model": "CoM-micro-S", "epochs": "700 steps"}]
        tree["train"]["log_every"] = 1
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump(tree))
        out = Folder(f"s3://bucket/run?{query}")
        command = [sys.executable, "-m", "raychain.run", str(file), "--json", "--out", out.address]
        command += ["--set", f"storage=s3://bucket/all?{query}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until(lambda: out.list("checkpoints/0-CoM-micro-S"), process)
        line.free.clear()
        time.sleep(30)
        line.free.set()
        answer, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        run = json.loads(answer)
        assert [stage["status"] for stage in run["stages"]] == ["trained"]
        assert run["restarts"] == []
        content = (out.read("metrics.jsonl") or b"").decode()
        times = [json.loads(x)["time"] for x in content.splitlines()]
        assert len(times) == 700
        assert max(b - a for a, b in itertools.pairwise(times)) < 5, "a step waited for the storage"
    finally:
        server.kill()
        server.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _wait_for(port: int) -> None:
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError
