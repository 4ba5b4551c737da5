"""What another package adds is named in an experiment and works on every worker, installed as users install it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

PACKAGES = Path(__file__).parent / "packages"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages of `tests/packages`, as pip puts them there."""
    where = tmp_path_factory.mktemp("site")
    for package in sorted(PACKAGES.iterdir()):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", where]
        subprocess.run([*command, package], check=True)
    return where


def environment(installed: Path) -> dict[str, str]:
    """The environment of a process in which the packages are installed."""
    paths = [str(installed), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def started(installed: Path, experiment: Path) -> subprocess.CompletedProcess[str]:
    """`raychain run --dry-run` of an experiment."""
    command = [sys.executable, "-m", "raychain.run", str(experiment), "--dry-run"]
    return subprocess.run(command, env=environment(installed), capture_output=True, text=True)


def run(installed: Path, experiment: Path, out: Path, kill_at: int | None = None) -> dict[str, Any]:
    """The result of `raychain run --json`; with `kill_at` a worker is killed once stage 1 has logged that step."""
    command = [sys.executable, "-m", "raychain.run", str(experiment), "--json", "--out", str(out)]
    with (out.parent / f"{out.name}.err").open("w+") as said, (out.parent / f"{out.name}.json").open("w+") as result:
        process = subprocess.Popen(command, env=environment(installed), stdout=result, stderr=said)
        killed, until = kill_at is None, time.monotonic() + 400
        while process.poll() is None and time.monotonic() < until:
            if not killed and any(stage == 1 and step >= (kill_at or 0) for stage, step in losses(out)):
                killed = _kill_a_worker(process.pid)
            time.sleep(0.05)
        process.kill()
        said.seek(0)
        result.seek(0)
        assert (process.wait(), killed) == (0, True), said.read()
        found: dict[str, Any] = json.load(result)
        return found


def _kill_a_worker(driver: int) -> bool:
    import psutil

    for child in psutil.Process(driver).children(recursive=True):
        if child.cmdline()[:1] == ["ray::RayTrainWorker"]:
            child.send_signal(signal.SIGKILL)
            return True
    return False


def pictures(folder: Path, count: int = 96) -> Path:
    """Shards of pictures that are brighter at the top, without captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(count // 2):
                ramp = np.linspace(255, 0, 32)[:, None, None] + rng.normal(0, 20, (32, 32, 3))
                file = io.BytesIO()
                Image.fromarray(ramp.clip(0, 255).astype(np.uint8)).save(file, "png")
                add(tar, f"{shard}-{i:03d}.png", file)
    return folder


def fields(folder: Path, count: int = 192) -> Path:
    """Shards of arrays that are a level in each of two channels, with noise, and one that has another shape."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(count // 2):
                field = (rng.normal(0, 1, (2, 1, 1)) + rng.normal(0, 0.1, (2, 16, 16))).astype(np.float32)
                file = io.BytesIO()
                np.save(file, field[:, :3] if (shard, i) == (1, 5) else field)
                add(tar, f"{shard}-{i:03d}.npy", file)
    return folder


def add(tar: tarfile.TarFile, name: str, file: io.BytesIO) -> None:
    """Adds what was written to a file."""
    info = tarfile.TarInfo(name)
    info.size = file.tell()
    file.seek(0)
    tar.addfile(info, file)


def losses(out: Path) -> dict[tuple[int, int], float]:
    """Loss by stage and step, as far as it is logged."""
    if not (out / "metrics.jsonl").exists():
        return {}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]
    return {(x["stage"], x["step"]): x["loss"] for x in lines}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_paradigm_of_another_package_trains_a_chain_and_survives_a_killed_worker(
    installed: Path, tmp_path: Path
) -> None:
    tree = {
        "name": "turned",
        "task": {"paradigm": "rotation"},
        "data": {"train": str(pictures(tmp_path / "data")), "image_size": 32},
        "chain": [{"model": "rot-S", "epochs": "120 steps"}, {"model": "rot-M", "epochs": "240 steps"}],
        "train": {"global_batch": 16, "warmup": "4 steps", "log_every": 10, "lr": 3.0e-3, "micro_batch": 3},
        "transfer": {"distill": {"alpha": 1.0, "cap": False}},
        "compute": {"workers": 2, "cpus_per_worker": 1},
        "checkpoint": {"every": "20 steps"},
        "preload": {"cache": str(tmp_path / "cache")},
    }
    (tmp_path / "turned.yaml").write_text(yaml.safe_dump(tree))
    undisturbed = run(installed, tmp_path / "turned.yaml", tmp_path / "whole")
    killed = run(installed, tmp_path / "turned.yaml", tmp_path / "killed", kill_at=60)
    assert [stage["status"] for stage in undisturbed["stages"]] == ["trained", "trained"]
    assert [stage["key"] for stage in killed["stages"]] == [stage["key"] for stage in undisturbed["stages"]]
    assert killed["restarts"]
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert found == pytest.approx(expected, rel=1e-5)
    first, last = expected[0, 10], expected[0, 120]
    assert last < 0.7 * first, "it learns to tell how a picture was turned"
    assert expected[1, 10] < 0.8 * first, "the larger model starts as the smaller one"
    stage = str(tmp_path / "whole" / "stages" / "0-rot-S")
    tree["chain"] = [{"checkpoint": stage}, {"model": "rot-M", "epochs": "8 steps"}]
    (tmp_path / "turned.yaml").write_text(yaml.safe_dump(tree))
    begun = run(installed, tmp_path / "turned.yaml", tmp_path / "begun")
    assert [found["status"] for found in begun["stages"]] == ["given", "trained"]
    assert losses(tmp_path / "begun")[1, 8] < 0.8 * first, "it begins with the trained one of the other run"
    folder = tmp_path / "whole" / "stages" / "1-rot-M"
    assert json.loads((folder / "config.json").read_text())["config"]["embed_dim"] == 64
    tree["data"] |= {"crop": [0.9, 1.0], "augment_on": "device"}
    (tmp_path / "turned.yaml").write_text(yaml.safe_dump(tree))
    wrong = started(installed, tmp_path / "turned.yaml")
    assert (wrong.returncode, "paradigm rotation finishes its pictures there" in wrong.stderr) == (2, True)


@pytest.mark.long
def test_a_reader_of_another_package_trains_a_chain_on_samples_that_are_no_pictures(
    installed: Path, tmp_path: Path
) -> None:
    tree: dict[str, Any] = {
        "name": "fields",
        "task": {"paradigm": "masked_fields"},
        "data": {"train": str(fields(tmp_path / "data")), "image_size": 16, "max_bad_fraction": 0.02},
        "chain": [{"model": "fields-32x1", "epochs": "200 steps"}, {"model": "fields-64x2", "epochs": "60 steps"}],
        "train": {"global_batch": 16, "warmup": "4 steps", "log_every": 10, "lr": 3.0e-3, "eps": 1.0e-6},
        "transfer": {"distill": {"alpha": 1.0, "cap": False}},
        "compute": {"workers": 2, "cpus_per_worker": 1},
        "preload": {"cache": str(tmp_path / "cache")},
    }
    (tmp_path / "fields.yaml").write_text(yaml.safe_dump(tree))
    two = run(installed, tmp_path / "fields.yaml", tmp_path / "two")
    assert [stage["status"] for stage in two["stages"]] == ["trained", "trained"]
    expected = losses(tmp_path / "two")
    assert expected[0, 200] < 0.6 * expected[0, 10], "it learns to fill in what is hidden"
    assert expected[1, 10] < 0.8 * expected[0, 10], "the larger model starts as the smaller one"
    assert "unusable array" in (tmp_path / "two.err").read_text()
    assert len(list((tmp_path / "cache" / "shards").glob("*.arrow"))) == 2
    tree["compute"]["workers"] = 1
    (tmp_path / "fields.yaml").write_text(yaml.safe_dump(tree))
    one = run(installed, tmp_path / "fields.yaml", tmp_path / "one")
    assert [stage["key"] for stage in one["stages"]] == [stage["key"] for stage in two["stages"]]
    assert losses(tmp_path / "one") == pytest.approx(expected, rel=1e-4)
    tree["data"]["train"] = str(pictures(tmp_path / "pictures"))
    (tmp_path / "fields.yaml").write_text(yaml.safe_dump(tree))
    wrong = started(installed, tmp_path / "fields.yaml")
    assert (wrong.returncode, "write each array to a member NAME.npy" in wrong.stderr) == (2, True), wrong.stderr


@pytest.mark.long
def test_an_evaluator_of_another_package_measures_every_stage_and_lower_is_better(
    installed: Path, demo: Path, tmp_path: Path
) -> None:
    tree: dict[str, Any] = {
        "name": "measured",
        "data": {"train": str(demo / "train"), "captions": {"keys": ["txt"]}},
        "chain": [{"model": "CoM-micro-S", "epochs": "24 steps"}, {"model": "CoM-micro-M", "epochs": "16 steps"}],
        "train": {"global_batch": 32, "warmup": "25 %", "precision": "fp32"},
        "compute": {"workers": 2, "cpus_per_worker": 1},
        "preload": {"cache": str(tmp_path / "cache")},
        "evaluate": {"pairs": {"type": "caption_loss", "data": str(demo / "test")}},
    }
    (tmp_path / "measured.yaml").write_text(yaml.safe_dump(tree))
    found = run(installed, tmp_path / "measured.yaml", tmp_path / "out")
    assert found["score"] == "pairs/loss"
    assert found["metrics"]["pairs/loss"] == {
        "label": "pairs caption loss", "unit": "nats", "best": "low", "brief": True, "former": "",
        "kind": "caption_loss"}  # fmt: skip
    losses = [stage["metrics"]["pairs/loss"] for stage in found["stages"]]
    assert all(0 < loss < 10 for loss in losses)
    said = (tmp_path / "out.err").read_text()
    assert f"pairs caption loss {losses[-1]:.2f} nats" in said
    tree["evaluate"]["pairs"]["type"] = "caption_los"
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(tree))
    wrong = started(installed, tmp_path / "wrong.yaml")
    assert (wrong.returncode, "did you mean caption_loss?" in wrong.stderr) == (2, True), wrong.stderr


@pytest.mark.long
def test_growth_operators_of_another_package_grow_a_chain(installed: Path, demo: Path, tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "name": "spread",
        "data": {"train": str(demo / "train"), "captions": {"keys": ["txt"]}},
        "chain": [{"model": "CoM-micro-S", "epochs": "4 steps"}, {"model": "CoM-micro-L", "epochs": "4 steps"}],
        "train": {"global_batch": 32, "warmup": "25 %", "precision": "fp32", "lr": 1.0e-12, "weight_decay": 0.0},
        "transfer": {"width": "padded", "depth": "on-top"},
        "compute": {"workers": 2, "cpus_per_worker": 1},
        "preload": {"cache": str(tmp_path / "cache")},
    }
    (tmp_path / "spread.yaml").write_text(yaml.safe_dump(tree))
    found = run(installed, tmp_path / "spread.yaml", tmp_path / "out")
    small, large = (load_file(tmp_path / "out" / stage["checkpoint"] / "open_clip_model.safetensors")
                    for stage in found["stages"])  # fmt: skip
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    rows, columns = small[name].shape
    assert large[name].shape > small[name].shape
    assert torch.allclose(large[name][:rows, :columns], small[name], atol=1e-6)
    assert large[name][rows:].abs().max() < 1e-6, "padded with zeros, which a learning rate of 1e-12 leaves as they are"
    closing = "visual.transformer.resblocks.{}.mlp.c_proj.weight"
    depth = sum(closing.format(layer) in large for layer in range(99))
    assert large[closing.format(depth - 1)].abs().max() < 1e-6, "the layers on top are identity blocks"
    assert large[closing.format(0)].abs().max() > 1e-3
