"""`raychain doctor`, and what the shell completes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raychain.cli import app
from raychain.cli.completing import experiments, models
from raychain.doctor.examining import examine
from raychain.doctor.machine import gpus, token


def findings(**options: str) -> dict[str, str]:
    return {found.name: found.state for found in examine(**options)}


def test_a_line_each_and_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bucket: Callable[[str], str]
) -> None:
    cache = ("--cache", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as stop:
        app(["doctor", *cache, "--storage", bucket("doctor"), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (stop.value.code or 0) == 0
    assert document["ok"]
    states = {found["name"]: found for found in document["found"]}
    assert {"python", "ray", "torch", "gpu", "memory", "cache", "storage", "cluster"} <= states.keys()
    assert "written, read and deleted" in states["storage"]["said"]
    with pytest.raises(SystemExit) as stop:
        app(["doctor", *cache, "--storage", "/proc/nothing"])
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(states), "one line each"
    assert any(line.startswith("PROBLEM storage") for line in lines)


def test_nothing_is_left_in_a_storage(tmp_path: Path) -> None:
    assert findings(storage=str(tmp_path / "runs"), cache=str(tmp_path))["storage"] == "ok"
    assert not list((tmp_path / "runs").iterdir())


def test_a_cluster_that_does_not_answer_is_a_problem(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert findings(address=f"127.0.0.1:{port}", cache=str(tmp_path))["cluster"] == "problem"
    assert findings(address="http://127.0.0.1:8265", cache=str(tmp_path))["cluster"] == "problem"


def test_a_cluster_that_answers(ray_session: None, tmp_path: Path) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    show = f"print([f for f in examine(address={address!r}) if f.name == 'cluster'])"
    script = f"from raychain.doctor.examining import examine; {show}"
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "1 nodes, 4 CPUs" in said


def test_what_is_wrong_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert token().state == "problem"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus().state == "ok"


def test_names_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").touch()
    Path("deeper").mkdir()
    assert {"demo", "demo-quick"} <= set(experiments("demo"))
    assert experiments("demo-q") == ["demo-quick"]
    assert {"mine.yaml", "deeper/"} <= set(experiments(""))
    assert models("CoM-micro-S") == ["CoM-micro-S", "CoM-micro-Swin"]
    assert "ViT-B-32" in models("ViT-B")
    settings = os.environ | {
        "_RAYCHAIN_COMPLETE": "complete_bash",
        "COMP_WORDS": "raychain run demo-q",
        "COMP_CWORD": "2",
    }
    program = "import sys; sys.argv = ['raychain']; from raychain.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", program], env=settings, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["demo-quick"], done.stderr
