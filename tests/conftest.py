"""One Ray instance for the whole session, small demo shards, and a tiny experiment."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None)  # other tests run beside, and a machine may be busy
settings.load_profile("suite")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """A command that a test calls in this process leaves its handlers of signals behind."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


QUICK = {
    "average", "captions", "cards", "config", "events", "golden", "growth_exact", "lanes", "macs", "optimizer", "order",
    "plan", "planning", "policy", "records", "report", "reporting", "rooms", "search_space", "yaml",
}  # fmt: skip
"""The files of `tests/run --quick`: each behaviour that changes often, in seconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs `ray_session` as a test of Ray, and the files of the quick selection."""
    for item in items:
        if item.path.stem.removeprefix("test_") in QUICK:
            item.add_marker("quick")
        if "ray_session" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Four logical CPUs, whatever the machine has."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo shards of 30 names and 1,200 training pictures."""
    from raychain.demo import make_demo

    out = tmp_path_factory.mktemp("data") / "demo"
    make_demo(out, names=30, pictures=1200, held_out=100, per_name=3)
    return out


@pytest.fixture(scope="session")
def bucket() -> Iterator[Callable[[str], str]]:
    """A bucket of an S3 server on this machine: makes addresses in it."""
    from moto.server import ThreadedMotoServer

    from raychain.core.storage import resolve

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    query = f"endpoint_override=http://{host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        filesystem, path = resolve(f"s3://bucket?{query}")
        filesystem.create_dir(path)
        yield lambda name: f"s3://bucket/{name}?{query}"
    server.stop()


def tiny(demo: Path, storage: Path, cache: Path) -> dict[str, Any]:
    """An experiment as a user would write it, that trains in seconds."""
    return {
        "name": "tiny",
        "data": {
            "train": str(demo / "train"),
            "captions": {"keys": ["txt", "json.captions"], "per_image": 2},
        },
        "chain": [{"model": "CoM-micro-S", "epochs": "24 steps"}, {"model": "CoM-micro-M", "epochs": "16 steps"}],
        "train": {"global_batch": 32, "warmup": "25 %", "precision": "fp32", "log_every": 4},
        "compute": {"workers": 1, "cpus_per_worker": 1},
        "preload": {"cache": str(cache)},
        "evaluate": {"zero_shot": str(demo / "zero_shot" / "test"), "retrieval": str(demo / "test")},
        "storage": str(storage),
    }


@pytest.fixture
def tree(demo: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`tiny`, in a storage of the test's own."""
    return tiny(demo, tmp_path / "runs", tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(scope="session")
def trained(ray_session: None, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`tiny`, trained once for the session, measured every eight steps too. `finished` gives copies."""
    import raychain
    from raychain.config.loading import validate

    experiment = tiny(demo, tmp_path_factory.mktemp("trained") / "runs", tmp_path_factory.getbasetemp() / "cache")
    experiment["evaluate"]["every"] = "8 steps"
    run = raychain.run(validate(experiment))
    assert run == json.loads((Path(experiment["storage"]) / "tiny" / "run.json").read_text())
    return experiment


@pytest.fixture
def finished(trained: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], Path, dict[str, Any]]:
    """run.json of a finished run, its folder, and its experiment: a copy for one test."""
    shutil.copytree(trained["storage"], tmp_path / "runs")
    out = tmp_path / "runs" / "tiny"
    return json.loads((out / "run.json").read_text()), out, deepcopy(trained) | {"storage": str(tmp_path / "runs")}
