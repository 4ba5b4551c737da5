"""A chain on a cluster that grows and shrinks by itself: Ray's autoscaler, whose fake provider starts nodes here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray.util import get_node_ip_address

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
from local import COUNT, end, free_ports

pytestmark = [pytest.mark.long, pytest.mark.ray]
HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""The id by which the fake provider knows the head."""


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory):
    """Address of a head with one CPU, and its clients' environment. Two more nodes of one CPU may come."""
    folder = tmp_path_factory.mktemp("a")
    kinds = {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1, "object_store_memory": 10**8}, "node_config": {}, "max_workers": 2},
    }
    (port,) = free_ports(1)
    gcs = {"gcs_address": f"{get_node_ip_address()}:{port}"}
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider = {"type": "external", "module": module, "launch_multiple": True, "head_node_id": HEAD}
    config: dict[str, Any] = {
        "cluster_name": "fake_multinode",
        "provider": provider | gcs | {"disable_launch_config_check": True, "disable_node_updaters": True},
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "file_mounts_sync_continuously": False,
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{f"{key}_commands": [] for key in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{key}_start_ray_commands": [] for key in ("head", "worker")},
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    }
    (folder / "autoscaling.json").write_text(json.dumps(config))
    command = ["-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=1"]
    command += [f"--autoscaling-config={folder}/autoscaling.json", f"--temp-dir={folder}", "--disable-usage-stats"]
    command += ["--include-dashboard=false", f"--object-store-memory={10**8}"]
    ids = {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD, "RAY_FAKE_CLUSTER": "1"}
    (folder / "token").write_text("0123456789abcdef" * 4)
    client = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    environment = client | ids | {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
    with (folder / "log").open("w") as log:
        started = subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log)
    node = {"pid": started.pid, "created": psutil.Process(started.pid).create_time()}
    try:
        until = time.monotonic() + 60
        while not (folder / "ray_current_cluster").exists():
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.2)
        yield (folder / "ray_current_cluster").read_text().strip(), client
    finally:
        end([node])


def nodes(address: str, environment: dict[str, str]) -> int:
    """How many are alive; 0 before the head answers."""
    asked = subprocess.run([sys.executable, "-c", COUNT, address], capture_output=True, text=True, env=environment)
    return int(asked.stdout) if asked.stdout.strip().isdigit() else 0


def test_stages_that_want_more_nodes_get_them_and_none_is_left_at_the_end(
    head, tree: dict[str, Any], tmp_path: Path
) -> None:
    sizes, steps = (1, 3, 2), (12, 12, 12)
    models = ("CoM-micro-S", "CoM-micro-M", "CoM-micro-L")
    tree["chain"] = [
        {"model": model, "epochs": f"{count} steps", "workers": workers}
        for model, count, workers in zip(models, steps, sizes, strict=True)
    ]
    tree |= {"evaluate": {}, "compute": {"cpus_per_worker": 1}}
    tree["train"]["log_every"] = 1
    file = tmp_path / "scaled.yaml"
    file.write_text(yaml.safe_dump(tree))
    out = tmp_path / "runs" / tree["name"]
    command = [sys.executable, "-m", "raychain.run", str(file), "--address", head[0]]
    seen: list[tuple[float, int]] = []
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, env=head[1])
        while driver.poll() is None:
            seen.append((time.time(), nodes(*head)))
            time.sleep(0.5)
    assert driver.returncode == 0, (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [{x["world_size"] for x in lines if x["stage"] == stage} for stage in range(3)] == [{n} for n in sizes]
    ended = max(x["time"] for x in lines if x["stage"] == 0)
    grown = next(at for at, count in seen if count == 3)
    print(f"two more nodes {grown - ended:.1f} s after the first stage's last step")
    assert grown - ended < 30
    until = time.monotonic() + 60
    while (left := nodes(*head)) > 1 and time.monotonic() < until:
        time.sleep(1)
    assert left == 1
