"""The README's path to a cluster: a job is submitted, read, stopped in the middle and submitted again, with a token."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.long, pytest.mark.ray]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory):
    """Environment of a client of `cluster/local.py`: a head with dashboard, a worker node of one CPU, a token."""
    folder = tmp_path_factory.mktemp("j")
    (folder / "token").write_text("0123456789abcdef" * 4)
    program = [sys.executable, str(ROOT / "cluster" / "local.py")]
    where = ["--dir", str(folder / "r"), "--token", str(folder / "token"), "--workers", "1"]
    started = subprocess.run([*program, "start", *where], capture_output=True, text=True)
    try:
        assert started.returncode == 0, started.stderr
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        plain["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{plain['PATH']}"
        yield plain | {k: v for k, v in re.findall(r"\b(RAY_\w+)=(\S+)", started.stdout) if k != "RAY_ADDRESS"}
    finally:
        subprocess.run([*program, "stop", *where], check=True, capture_output=True)


def job(cluster: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["ray", "job", *arguments]
    return subprocess.run(command, env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=400)


def test_a_job_is_stopped_in_the_middle_and_continues_when_it_is_submitted_again(
    cluster: dict[str, str], tree: dict[str, Any], tmp_path: Path
) -> None:
    tree["chain"][1]["epochs"] = "300 steps"
    tree |= {"evaluate": {}, "compute": {"workers": 1, "cpus_per_worker": 1}}
    file, out = tmp_path / "tiny.yaml", tmp_path / "runs" / "tiny"
    file.write_text(yaml.safe_dump(tree))
    run = ["--working-dir", ".", "--", "python", "-m", "raychain.run", str(file)]

    refused = job(cluster | {"RAY_AUTH_TOKEN_PATH": os.devnull}, "list")
    assert refused.returncode != 0

    submitted = job(cluster, "submit", "--submission-id", "first", "--no-wait", *run)
    assert submitted.returncode == 0, submitted.stderr
    until = time.monotonic() + 200
    while not any(line["stage"] == 1 for line in lines(out)):
        assert time.monotonic() < until, job(cluster, "logs", "first").stdout
        time.sleep(0.2)
    assert exported(cluster).keys() >= {"ray_raychain_images_per_second", "ray_raychain_step", "ray_raychain_workers"}
    stopped = job(cluster, "stop", "first")
    assert stopped.returncode == 0, stopped.stderr
    logs = re.sub(r".* cli\.py:.*", "", job(cluster, "logs", "first").stdout)  # the command's own lines are coloured
    assert "stage 1/2 CoM-micro-S" in logs
    assert "\r" not in logs
    assert "\x1b[" not in logs
    assert "the same command continues" in logs
    assert "Traceback" not in logs
    before = json.loads((out / "run.json").read_text())
    assert (before["status"], [s["status"] for s in before["stages"]]) == ("interrupted", ["trained"])
    saved = max(int(folder.name) for folder in (out / "checkpoints/1-CoM-micro-M").iterdir())

    again = job(cluster, "submit", "--submission-id", "second", *run)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"resumed at step {saved}" in again.stdout
    assert (
        "succeeded" in job(cluster, "status", "second").stderr.lower() + job(cluster, "status", "second").stdout.lower()
    )
    after = json.loads((out / "run.json").read_text())
    assert (after["status"], [s["status"] for s in after["stages"]]) == ("succeeded", ["reused", "trained"])
    places = [(line["stage"], line["step"]) for line in lines(out)]
    assert places == sorted(set(places))

    wrong = job(cluster, "submit", "--submission-id", "third", *run, "--set", "train.lrr=1")
    assert wrong.returncode != 0
    assert "train.lrr" in wrong.stdout


def lines(out: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []


NODES = """
import ray
ray.init(log_to_driver=False)
print([f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()])
"""


def exported(cluster: dict[str, str]) -> dict[str, str]:
    """raychain's metrics that the nodes' exporters serve, once there are any."""
    until, found = time.monotonic() + 60, dict[str, str]()
    asked = job(cluster, "submit", "--submission-id", f"nodes-{time.time_ns()}", "--", "python", "-c", NODES)
    addresses = re.findall(r"'([\d.]+:\d+)'", asked.stdout)
    assert addresses, asked.stdout + asked.stderr
    while not found and time.monotonic() < until:
        for address in addresses:
            text = urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read().decode()
            found |= dict(re.findall(r"^(ray_raychain_\w+)(\{.*)$", text, re.M))
        time.sleep(1)
    return found
