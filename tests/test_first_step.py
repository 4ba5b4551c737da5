"""What is read, and how long it takes, before the first step of a run on object storage; counting on several nodes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import webdataset
import yaml
from PIL import Image

from raychain.cli.run import run_command
from raychain.core.storage import Folder
from raychain.data.addresses import MANY, expand

SHARDS, SAMPLES = 40, 8


class Asked(NamedTuple):
    """A request that the server has answered."""

    time: float
    method: str
    path: str
    bytes: int


class S3:
    """moto's S3 behind a layer that counts what it is asked and what it sends."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._app = DomainDispatcherApplication(create_backend_app)
        self.asked: list[Asked] = []
        self.server = make_server("127.0.0.1", 0, self._counted, threaded=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _counted(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        body = b"".join(self._app(environ, start_response))
        method = environ["REQUEST_METHOD"]
        sent = len(body) if method == "GET" else 0
        self.asked.append(Asked(time.time(), method, environ["PATH_INFO"], sent))
        return [body]

    def address(self, name: str) -> str:
        """An address in its bucket."""
        query = f"endpoint_override=http://127.0.0.1:{self.server.server_port}&scheme=http&region=us-east-1"
        return f"s3://set/{name}?{query}&allow_bucket_creation=true"

    def read(self) -> list[Asked]:
        """The requests that got content of shards."""
        return [asked for asked in self.asked if asked.method == "GET" and asked.path.endswith(".tar")]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """With a set of shards of noise."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server, rng = S3(), np.random.default_rng(0)
    folder = Folder(server.address("data"))
    folder.fs.create_dir("set")
    folder.fs.delete_dir_contents("set")  # moto keeps in this process what other tests have stored
    for i in range(SHARDS):
        content = io.BytesIO()
        with webdataset.TarWriter(content) as tar:
            for j in range(SAMPLES):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(picture, "png")
                tar.write({"__key__": f"{i:03}{j}", "png": picture.getvalue(), "txt": f"noise {i} {j}"})
        folder.write(f"{i:05}.tar", content.getvalue())
    yield server
    server.server.shutdown()


def size(server: S3) -> int:
    """Bytes of the shards."""
    folder = Folder(server.address("data"))
    return sum(len(folder.read(name) or b"") for name in folder.list() if name.endswith(".tar"))


def tree(server: S3, tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "first",
        "data": {"train": server.address(f"data/{{00000..{SHARDS - 1:05}}}.tar"), "captions": {"keys": ["txt"]}},
        "chain": [{"model": "CoM-micro-S", "epochs": "8 steps"}],
        "train": {"global_batch": 16, "warmup": "25 %", "log_every": 1, "precision": "fp32"},
        "compute": {"workers": 1, "cpus_per_worker": 1},
        "preload": {"cache": str(tmp_path / "cache")},
        "storage": str(tmp_path / "runs"),
        **more,
    }


def add_statistics(server: S3) -> None:
    """What img2dataset leaves beside its shards."""
    folder = Folder(server.address("data"))
    for i in range(SHARDS):
        folder.write_json(f"{i:05}_stats.json", {"count": SAMPLES + 2, "successes": SAMPLES})


def importing() -> float:
    """Seconds that a process takes to import what a worker needs."""
    began = time.time()
    subprocess.run([sys.executable, "-c", "import ray.train, raychain.training.stage"], check=True)
    return time.time() - began


def plan(experiment: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """Where `--dry-run` has the counts from."""
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(experiment))
    run_command(str(tmp_path / "first.yaml"), dry_run=True, as_json=True)
    return dict(json.loads(capsys.readouterr().out)["counts"])


def test_statistics_beside_shards_spare_reading_them(
    s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_statistics(s3)
    whole = size(s3)
    s3.asked.clear()
    assert len(expand([s3.address(f"data/{{00000..{SHARDS - 1:05}}}.tar")], "x")) == SHARDS > MANY
    assert len(s3.asked) <= 3, "a listing, not a request a shard"
    s3.asked.clear()
    assert plan(tree(s3, tmp_path), tmp_path, capsys) == {"from _stats.json": SHARDS}
    assert not s3.read()
    sent = sum(asked.bytes for asked in s3.asked if asked.path.endswith((".tar", ".json")))
    print(f"{len(s3.asked)} requests for {SHARDS} shards, {sent:,} bytes of {whole:,} in files")
    assert sent < 0.01 * whole
    assert len(s3.asked) <= 3 * SHARDS + 10, "one for the ETag, one or two for the statistics"


@pytest.mark.long
@pytest.mark.ray
def test_a_run_on_object_storage_reads_nothing_before_it_trains_and_begins_within_15_seconds(
    s3: S3, tmp_path: Path
) -> None:
    add_statistics(s3)
    whole = size(s3)
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(tree(s3, tmp_path)))
    s3.asked.clear()
    started, planned = time.time(), 0.0
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", "raychain.run", str(tmp_path / "first.yaml")], stdout=log, stderr=log
        )
        while run.poll() is None:
            planned = planned or (time.time() if (tmp_path / "runs/first/run.json").exists() else 0.0)
            time.sleep(0.02)
    assert run.returncode == 0, (tmp_path / "log").read_text()
    steps = [json.loads(line) for line in (tmp_path / "runs/first/metrics.jsonl").read_text().splitlines()]
    before = [asked for asked in s3.asked if asked.time <= planned]
    sent = sum(asked.bytes for asked in before if asked.path.endswith((".tar", ".json")))
    bars = json.loads((tmp_path / "runs/first/trace.json").read_text())["traceEvents"]
    stage = next(bar["ts"] for bar in bars if bar.get("name") == "CoM-micro-S") / 1e6
    took, done = stage + steps[0]["data_wait_s"] - started, steps[0]["time"] - started
    print(f"planned after {planned - started:.1f} s and {len(before)} requests, {sent:,} bytes of {whole:,}; "
          f"first step begun after {took:.1f} s and done after {done:.1f}")  # fmt: skip
    assert not any(asked.path.endswith(".tar") and asked.method == "GET" for asked in before)
    assert sent < 0.01 * whole
    assert s3.read(), "and then it reads them"
    assert took < max(15, 5 * importing()), "four of five seconds are imports, of several processes on two cores"


@pytest.mark.long
@pytest.mark.ray
def test_shards_are_counted_on_all_nodes_and_for_the_next_job_of_another_node(
    s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from faults import Site

    experiment = tree(s3, tmp_path)
    s3.asked.clear()
    with Site(experiment, tmp_path, nodes=2) as site:
        site.start()
        site.wait(lambda: False, 300)
        assert site.driver
        said = site.log.read_text()
    assert site.driver.returncode == 0, said
    assert f"{SHARDS} shards were counted on 2 nodes" in said
    s3.asked.clear()
    other = experiment | {"preload": {"cache": str(tmp_path / "another node's cache")}}
    assert plan(other, tmp_path, capsys) == {"counted before": SHARDS}
    assert not s3.read()
    assert os.listdir(tmp_path / "runs" / "counts")  # noqa: PTH208
