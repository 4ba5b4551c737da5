"""`raychain grow`: any kind of checkpoint becomes a larger one that unmodified open_clip loads."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from growing import perturb
from open_clip.model import get_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from payload import Payload
from PIL import Image
from pyarrow import fs
from safetensors.torch import save_file
from test_broken_shards import add, pair, shard_of
from test_feed import encode

import raychain
from raychain.api.grow import _read_inputs, grow_checkpoint
from raychain.cli.grow import grow_command
from raychain.cli.program import main
from raychain.core.storage import resolve
from raychain.data import pixels
from raychain.data.addresses import expand
from raychain.errors import InputError
from raychain.growth import GrowthError
from raychain.models import build, model_config
from raychain.models.checkpoints import read_checkpoint
from raychain.paradigms import make_paradigm
from raychain.paradigms.task import Task
from raychain.training.artifact import write_artifact

SMALL, LARGE = "CoM-micro-S", "CoM-micro-L"


@pytest.fixture(scope="module")
def small() -> Any:
    return perturb(build(SMALL, seed=0))


@pytest.fixture
def folder(small: Any, tmp_path: Path) -> Path:
    """A stage folder."""
    path = tmp_path / "small"
    path.mkdir()
    write_artifact(path, make_paradigm(Task()), small, model_config(SMALL), 40)
    return path


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["raychain.grow", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main(grow_command, "grow")
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err


def save(small: Any, kind: str, path: Path) -> Path:
    state = {name: value.clone() for name, value in small.state_dict().items()}
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pt":
        torch.save(state, path)
    else:  # as open_clip_train writes it, with DDP's prefix
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    return path


@pytest.mark.parametrize("kind", ["folder", "safetensors", "pt", "training"])
def test_every_kind_of_checkpoint_grows_and_loads_in_open_clip(
    kind: str, small: Any, folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    source = folder if kind == "folder" else save(small, kind, tmp_path / f"weights.{kind}".replace("training", "pt"))
    named = [] if kind == "folder" else ["--from", SMALL]
    out = tmp_path / "grown"
    status, stdout, stderr = call(capsys, monkeypatch, source, "--to", LARGE, "--out", out, *named, "--json")
    assert status == 0, stderr
    report = json.loads(stdout)
    assert report["drift"]["text"]["relative_error"] < 1e-4
    assert report["drift"]["image"]["worst_cosine"] > 0.999
    assert report["towers"]["visual"]["widths"]["visual.embed"] == [64, 192]
    assert report["towers"]["text"]["identity"]["text.layers"] == [1, 3]
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    model.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(["a red apple left of a cat", "dog"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokens), small.eval().encode_text(tokens), rtol=1e-3, atol=1e-4)


def test_the_drift_is_measured_on_real_pictures_when_shards_are_given(
    demo: Path, folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    arguments = [folder, "--to", LARGE, "--out", tmp_path / "grown", "--data", demo / "test", "--samples", 8]
    status, stdout, stderr = call(capsys, monkeypatch, *arguments)
    assert status == 0, stderr
    assert f"drift on {demo / 'test'}" in stdout
    assert "embed 64 → 192" in stdout
    assert "cosine 1.000000" in stdout


def test_pictures_are_read_as_open_clip_reads_them_and_within_bounds(folder, tmp_path, monkeypatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    long, large = Image.new("RGB", (65_000, 1)), Image.new("L", (1200, 1200))
    pictures = [pair(str(n), encode(picture), txt=b"x") for n, picture in enumerate((long, noise, large))]
    shard, resize, areas = shard_of(tmp_path / "0.tar", *pictures), Image.Image.resize, []

    def watched(image: Image.Image, size: tuple[int, int], *arguments: Any, **options: Any) -> Image.Image:
        areas.append(size[0] * size[1])
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    monkeypatch.setattr(pixels, "MEMORY", 2**20)
    checkpoint = read_checkpoint(folder)
    images, tokens = _read_inputs(checkpoint, str(shard), 99)
    assert max(areas) <= pixels.LARGE
    assert len(images) == len(tokens) == 6, "all but the large one"
    transform = image_transform_v2(PreprocessCfg(**get_model_preprocess_cfg(checkpoint.model)), is_train=False)
    torch.testing.assert_close(images[3], transform(noise))


def test_a_shard_that_goes_away_is_one_message(folder, tmp_path, capsys, monkeypatch) -> None:
    shard = shard_of(tmp_path / "0.tar")

    def gone(patterns: list[str], where: str) -> list[str]:
        found = expand(patterns, where)
        shard.unlink()
        return found

    monkeypatch.setattr("raychain.api.grow.expand", gone)
    status, _, said = call(capsys, monkeypatch, folder, "--to", LARGE, "--out", tmp_path / "grown", "--data", shard)
    assert (status, said.startswith("raychain: --data\n")) == (2, True), said
    assert not (tmp_path / "grown").exists()


def test_a_model_for_pictures_that_are_not_square_is_measured_on_random_input(folder, tmp_path, capsys, monkeypatch):
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {**config.get("preprocess_cfg", {}), "resize_mode": "longest"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    arguments = [folder, "--to", LARGE, "--out", tmp_path / "grown"]
    status, _, said = call(capsys, monkeypatch, *arguments, "--data", shard_of(tmp_path / "0.tar"))
    assert status == 2
    assert "resize_mode longest" in said
    assert call(capsys, monkeypatch, *arguments)[0] == 0


def test_operators_are_taken_and_embed_does_not_keep_the_function(folder, tmp_path, capsys, monkeypatch) -> None:
    options = ["--width", "embed", "--depth", "interleave", "--json"]
    status, stdout, _ = call(capsys, monkeypatch, folder, "--to", LARGE, "--out", tmp_path / "grown", *options)
    report = json.loads(stdout)
    assert status == 0
    assert (report["width"], report["depth"]) == ("embed", "interleave")
    assert report["drift"]["image"]["cosine"] < 0.99


CASES: dict[str, tuple[list[str], list[str]]] = {
    "unknown model": (["--to", "CoM-micro-X"], ["--to", "CoM-micro-X", "did you mean"]),
    "shrinking": (["--to", "CoM-micro-T"], ["CoM-micro-T", "narrower"]),
    "unknown operator": (["--to", LARGE, "--width", "centered"], ["centered", "did you mean 'centred'?"]),
    "wrong architecture": (["--to", LARGE, "--from", "CoM-micro-M"], ["SMALL", "CoM-micro-M", "has shape"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_arguments_are_one_message_and_write_nothing(case, folder, tmp_path, capsys, monkeypatch) -> None:
    arguments, expected = CASES[case]
    status, _, stderr = call(capsys, monkeypatch, folder, "--out", tmp_path / "grown", *arguments)
    assert status == 2, stderr
    for part in ("given", "allowed", "fix", *expected):
        assert part in stderr
    assert not (tmp_path / "grown").exists()


def test_a_folder_that_is_not_empty_is_left_alone(folder, tmp_path, capsys, monkeypatch) -> None:
    status, _, stderr = call(capsys, monkeypatch, folder, "--to", LARGE, "--out", folder)
    assert status == 2
    assert "a new or empty folder" in stderr


def test_a_file_that_does_not_say_its_model_asks_for_it(small, tmp_path, capsys, monkeypatch) -> None:
    file = save(small, "safetensors", tmp_path / "weights.safetensors")
    status, _, stderr = call(capsys, monkeypatch, file, "--to", LARGE, "--out", tmp_path / "grown")
    assert status == 2
    assert "--from" in stderr


@pytest.mark.parametrize("kind", ["pickle", "truncated"])
def test_files_that_are_no_plain_weights_are_refused_and_nothing_in_them_runs(
    kind, small, tmp_path, capsys, monkeypatch
) -> None:
    file, ran = tmp_path / "weights.pt", tmp_path / "ran"
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"a": Payload(ran)}))
    else:
        file.write_bytes(save(small, "pt", file).read_bytes()[:5000])
    status, _, stderr = call(capsys, monkeypatch, file, "--from", SMALL, "--to", LARGE, "--out", tmp_path / "grown")
    assert status == 2, stderr
    assert str(file) in stderr
    assert not ran.exists()


def test_modules_grow_in_place_from_python(small: Any) -> None:
    large = build(LARGE, seed=1)
    report = raychain.grow(small, large)
    assert (report.width, report.depth) == ("centred", "identity")
    with pytest.raises(GrowthError, match="fewer than the 4"):
        raychain.grow(large, build(SMALL, seed=0))


GROW_LARGE = """
import resource, sys, time
import torch
from raychain.models import build
import raychain
small, large = build("ViT-B-16", seed=0), build("ViT-L-16", seed=1)
started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
raychain.grow(small, large)
print(time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_vit_b_grows_into_vit_l_in_half_a_minute_and_6_gb() -> None:
    """Processor time on one thread, so that other load on the machine does not enter."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", GROW_LARGE], capture_output=True, text=True, env=environment, check=True
    )
    seconds, gib = map(float, done.stdout.split())
    assert seconds < 30
    assert gib < 6


def test_captions_that_are_no_json_are_left_out_of_what_drift_is_measured_on(folder: Path, tmp_path: Path) -> None:
    good, odd = ({"png": encode(Image.new("RGB", (40, 40), "red"))} | text for text in (
        {"txt": b"red"}, {"json": b"[" * 100_000}))  # fmt: skip
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key, sample in (("0", odd), ("1", odd | {"json": b"not JSON"}), ("2", good)):
            for extension, content in sample.items():
                add(tar, f"{key}.{extension}", content)
    grown = grow_checkpoint(folder, LARGE, tmp_path / "large", data=str(tmp_path / "0.tar"))
    assert grown.drift["text"].relative_error < 1e-3
    (tmp_path / "odd").mkdir()
    with tarfile.open(tmp_path / "odd" / "0.tar", "w") as tar:
        for extension, content in odd.items():
            add(tar, f"0.{extension}", content)
    with pytest.raises(InputError, match=r"^--data\n"):
        grow_checkpoint(folder, LARGE, tmp_path / "other", data=str(tmp_path / "odd" / "0.tar"))


def test_a_checkpoint_on_object_storage_grows(bucket: Any, folder: Path, tmp_path: Path) -> None:
    address = bucket("small")
    filesystem, path = resolve(address)
    fs.copy_files(str(folder), path, fs.LocalFileSystem(), filesystem)
    grown = grow_checkpoint(address, LARGE, tmp_path / "large")
    assert grown.drift["image"].relative_error < 1e-3
    with pytest.raises(InputError, match=r"^SMALL\n.*nothing-there.*(\n.*)*does not exist"):
        grow_checkpoint(bucket("nothing-there"), LARGE, tmp_path / "other")
