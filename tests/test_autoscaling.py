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
import ray
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
from local import end, free_ports

pytestmark = pytest.mark.long
HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""The id by which the fake provider knows the head."""


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory):
    """Address of a head with one CPU, whose cluster may have two more nodes of one CPU each."""
    folder = tmp_path_factory.mktemp("a")
    example = yaml.safe_load(
        (Path(ray.__file__).parent / "autoscaler/_private/fake_multi_node/example.yaml").read_text()
    )
    kinds = {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 1, "object_store_memory": 10**8},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    }
    example |= {"available_node_types": kinds, "idle_timeout_minutes": 0.1, "max_workers": 2}
    example["provider"] |= {"launch_multiple": True, "head_node_id": HEAD}
    (folder / "autoscaling.json").write_text(json.dumps(example))
    (port,) = free_ports(1)
    command = ["-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=1"]
    command += [f"--autoscaling-config={folder}/autoscaling.json", f"--temp-dir={folder}", "--disable-usage-stats"]
    command += ["--include-dashboard=false", f"--object-store-memory={10**8}"]
    ids = {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD, "RAY_FAKE_CLUSTER": "1"}
    environment = os.environ | ids | {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
    with (folder / "log").open("w") as log:
        started = subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log)
    node = {"pid": started.pid, "created": psutil.Process(started.pid).create_time()}
    try:
        yield f"127.0.0.1:{port}"
    finally:
        end([node])


def nodes(address: str) -> int:
    """How many are alive; 0 before the head answers."""
    asked = subprocess.run([sys.executable, "-c", COUNT, address], capture_output=True, text=True)
    return int(asked.stdout) if asked.stdout.strip().isdigit() else 0


COUNT = """
import sys
from ray._raylet import GcsClient
print(sum(node.state == 0 for node in GcsClient(address=sys.argv[1]).get_all_node_info().values()))
"""


def test_stages_that_want_more_nodes_get_them_and_none_is_left_at_the_end(
    head, tree: dict[str, Any], tmp_path: Path
) -> None:
    until = time.monotonic() + 60
    while nodes(head) < 1 and time.monotonic() < until:
        time.sleep(0.5)
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
    command = [sys.executable, "-m", "raychain.run", str(file), "--address", head]
    seen: list[tuple[float, int]] = []
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log)
        while driver.poll() is None:
            seen.append((time.time(), nodes(head)))
            time.sleep(0.5)
    assert driver.returncode == 0, (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [{x["world_size"] for x in lines if x["stage"] == stage} for stage in range(3)] == [{n} for n in sizes]
    ended = max(x["time"] for x in lines if x["stage"] == 0)
    grown = next(at for at, count in seen if count == 3)
    print(f"two more nodes {grown - ended:.1f} s after the first stage's last step")
    assert grown - ended < 30
    until = time.monotonic() + 60
    while (left := nodes(head)) > 1 and time.monotonic() < until:
        time.sleep(1)
    assert left == 1
