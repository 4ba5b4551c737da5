"""`raychain evaluate`: clip_benchmark's numbers for every kind of checkpoint; one message for what is wrong."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from growing import perturb
from moto.server import ThreadedMotoServer
from open_clip.transform import PreprocessCfg, image_transform_v2
from payload import Payload
from PIL import Image
from pyarrow import fs
from safetensors.torch import save_file

import raychain
from raychain.cli.evaluate import evaluate_command
from raychain.cli.program import main
from raychain.data.decode import resize_exactly
from raychain.data.spec import Resizing
from raychain.models import build, model_config
from raychain.paradigms import make_paradigm
from raychain.paradigms.task import Task
from raychain.training.artifact import write_artifact

MODEL = "CoM-micro-S"
OLDER_NUMPY = "numpy==2.3.5"
"""clip_benchmark 1.6.2's zero-shot accuracy makes a float of a one-element array, which numpy 2.4 made an error."""


@pytest.fixture(scope="module")
def clip() -> Any:
    return perturb(build(MODEL, seed=0))


@pytest.fixture(scope="module")
def folder(clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage folder, with its optimiser state."""
    path = tmp_path_factory.mktemp("stages") / "0-CoM-micro-S"
    path.mkdir()
    write_artifact(path, make_paradigm(Task()), clip, model_config(MODEL), 40)
    (path / "optimizer.safetensors").write_bytes(b"not wanted")
    (path / "stage.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def retrieval(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip_benchmark's retrieval layout: the demo's test pictures, one to three captions in the lines of each txt."""
    root = tmp_path_factory.mktemp("data") / "retrieval"
    (root / "test").mkdir(parents=True)
    shards = sorted((demo / "test").glob("*.tar"))
    for number, shard in enumerate(shards):
        with webdataset.TarWriter(str(root / "test" / f"{number}.tar")) as tar:
            for place, sample in enumerate(webdataset.WebDataset(str(shard), shardshuffle=False)):
                captions = [sample["txt"].decode(), *json.loads(sample["json"])["captions"]]
                text = "\n".join(captions[: 1 + place % 3])
                tar.write({"__key__": sample["__key__"], "jpg": sample["jpg"], "txt": text})
    (root / "test" / "nshards.txt").write_text(f"{len(shards)}\n")
    (root / "dataset_type.txt").write_text("retrieval\n")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["raychain.evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main(evaluate_command, "evaluate")
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err


@pytest.mark.slow
def test_the_numbers_are_those_of_clip_benchmark(
    folder: Path, demo: Path, retrieval: Path, cache: Path, tmp_path: Path
) -> None:
    """clip_benchmark itself, in a process with the numpy it can work with; in fp32, as raychain measures."""
    numpy = tmp_path / "numpy"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(numpy), OLDER_NUMPY]
    subprocess.run(pip, check=True, capture_output=True)
    roots = tmp_path / "roots"
    roots.mkdir()
    (roots / "demo").symlink_to(demo / "zero_shot" / "test")
    (roots / "mscoco_captions").symlink_to(retrieval)  # by this name it knows the task
    benchmark = [sys.executable, "-m", "clip_benchmark.cli", "eval", "--model", f"local-dir:{folder}"]
    benchmark += ["--pretrained", "", "--dataset", "wds/demo", "wds/mscoco_captions", "--no_amp", "--quiet"]
    benchmark += ["--dataset_root", f"{roots}/{{dataset}}", "--output", f"{tmp_path}/{{dataset}}.json"]
    benchmark += ["--recall_k", "1", "5", "10", "--num_workers", "0"]
    environment = os.environ | {"PYTHONPATH": f"{numpy}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(benchmark, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = {
        name: json.loads((tmp_path / f"{name}.json").read_text())["metrics"] for name in ("demo", "mscoco_captions")
    }
    addresses = [str(demo / "zero_shot" / "test"), str(retrieval)]
    zero_shot, found = raychain.evaluate(str(folder), addresses, cache=str(cache))["results"]
    for k in (1, 5):
        assert zero_shot["metrics"][f"zero_shot_top{k}"] == pytest.approx(100 * theirs["demo"][f"acc{k}"], abs=0.1)
    for k in (1, 5, 10):
        for ours, direction in (("i2t", "text"), ("t2i", "image")):
            expected = 100 * theirs["mscoco_captions"][f"{direction}_retrieval_recall@{k}"]
            assert found["metrics"][f"{ours}_r{k}"] == pytest.approx(expected, abs=0.1)


def test_what_lies_at_an_address_decides_what_is_measured(
    folder: Path, demo: Path, retrieval: Path, cache: Path, capsys, monkeypatch
) -> None:
    data = [demo / "zero_shot" / "test", retrieval, demo / "test", demo, demo / "test" / "*.tar"]
    options = [option for address in data for option in ("--data", address)]
    status, out, err = call(capsys, monkeypatch, folder, *options, "--cache", cache, "--json")
    assert status == 0, err
    report = json.loads(out)
    assert (report["image_size"], report["device"], report["checkpoint"]) == (40, "cpu", str(folder))
    tasks = [row["task"] for row in report["results"]]
    assert tasks == ["zero_shot", *["retrieval"] * 4]
    assert [row["data"] for row in report["results"]] == [str(address) for address in data]
    zero_shot, lines, *plain = (row["metrics"] for row in report["results"])
    assert set(zero_shot) == {"zero_shot_top1", "zero_shot_top5"}
    assert set(lines) == {f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)}
    assert plain[0] == plain[1] == plain[2] != lines


def test_the_table_says_what_was_measured(folder, demo, retrieval, cache, capsys, monkeypatch) -> None:
    data = ["--data", demo / "zero_shot" / "test", "--data", retrieval]
    status, out, err = call(capsys, monkeypatch, folder, *data, "--cache", cache)
    assert status == 0, err
    for part in ("M parameters, 40 px, cpu", "30 classes, 3 templates", "top-5", "image → text", "R@10"):
        assert part in out


def test_caption_keys_are_those_of_a_run(folder, demo, cache) -> None:
    one, more = (
        raychain.evaluate(str(folder), str(demo), captions=keys, cache=str(cache))["results"][0]
        for keys in (("txt",), ("txt", "json.captions"))
    )
    assert one["captions"] == ["txt"]
    assert one["metrics"] != more["metrics"]


@pytest.mark.parametrize("kind", ["local-dir", "safetensors", "pt", "training"])
def test_every_kind_of_checkpoint_gives_the_same_numbers(kind, clip, folder, demo, cache, tmp_path) -> None:
    data = str(demo / "zero_shot" / "test")
    expected = raychain.evaluate(str(folder), data, cache=str(cache))["results"]
    state = {name: value.clone() for name, value in clip.state_dict().items()}
    path, model = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pt'}", MODEL
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pt":
        torch.save(state, path)
    elif kind == "training":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    else:
        path, model = f"local-dir:{folder}", None
    assert raychain.evaluate(str(path), data, model=model, cache=str(cache))["results"] == expected


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[fs.FileSystem, str]]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("EC2_METADATA_DISABLED", "true")):
        monkeypatch.setenv(f"AWS_{name}", value)
    store = fs.S3FileSystem(endpoint_override=f"http://{host}:{port}", region="us-east-1", allow_bucket_creation=True)
    store.create_dir("runs")
    yield store, f"endpoint_override=http%3A%2F%2F{host}%3A{port}&region=us-east-1"
    server.stop()


def test_stage_folders_on_object_storage_are_read(bucket, folder, demo, cache) -> None:
    store, query = bucket
    fs.copy_files(str(folder), "runs/demo/stages/0", fs.LocalFileSystem(), store)
    data = str(demo / "zero_shot" / "test")
    expected = raychain.evaluate(str(folder), data, cache=str(cache))["results"]
    for name in ("", "/open_clip_model.safetensors"):
        address = f"s3://runs/demo/stages/0{name}?{query}"
        assert raychain.evaluate(address, data, cache=str(cache))["results"] == expected
    with pytest.raises(raychain.errors.InputError, match=r"CHECKPOINT(.|\n)*does not exist"):
        raychain.evaluate(f"s3://runs/demo/stages/1?{query}", data, cache=str(cache))


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(61, 47), (47, 90), (40, 40), (33, 21)])
def test_pictures_are_to_the_bit_those_of_open_clip(mode: str, kernel: Any, shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "jpeg")
    config = PreprocessCfg(size=40, mean=(0, 0, 0), std=(1, 1, 1), interpolation=kernel, resize_mode=mode)
    theirs = image_transform_v2(config, is_train=False)(Image.open(content)).permute(1, 2, 0) * 255
    ours = resize_exactly(content.getvalue(), 40, Resizing(mode == "squash", kernel))
    assert np.array_equal(ours, theirs.round().byte().numpy())


CASES: dict[str, tuple[list[str], list[str]]] = {
    "missing checkpoint": (["{tmp}/none"], ["CHECKPOINT", "does not exist"]),
    "a name": (["ViT-B-32"], ["ViT-B-32, a name", "nothing is downloaded", "--model NAME"]),
    "a hub's name": (["hf-hub:someone/model"], ["nothing is downloaded"]),
    "a run folder": (["{tmp}/run"], ["a run folder", "stages/0-CoM-micro-S"]),
    "weights without a model": (["{tmp}/weights.safetensors"], ["--model"]),
    "wrong model": (["{tmp}/weights.safetensors", "--model", "CoM-micro-M"], ["CoM-micro-M", "has shape"]),
    "unknown model": (["{tmp}/weights.safetensors", "--model", "CoM-micro-X"], ["--model", "did you mean"]),
    "a tokenizer to download": (
        ["{tmp}/weights.safetensors", "--model", "ViT-B-16-SigLIP"],
        ["--model", "must be downloaded"],
    ),
    "code in a pickle": (["{tmp}/code.pt", "--model", MODEL], ["CHECKPOINT", "weights alone"]),
    "padded pictures": (["{tmp}/padded"], ["resize_mode longest", "clip_benchmark"]),
    "no data": (["{folder}", "--data", "{tmp}/nothing"], ["--data", "no such file"]),
    "no shards": (["{folder}", "--data", "{tmp}/run"], ["--data", "nothing matches"]),
    "labels without names": (["{folder}", "--data", "{tmp}/few"], ["--data", "complete classnames.txt"]),
    "captions nobody wrote": (["{folder}", "--captions", "json.none|words"], ["--captions", "|lines"]),
    "unknown device": (["{folder}", "--device", "gpu"], ["--device", "gpu"]),
    "cache": (["{folder}", "--cache", "{tmp}/weights.safetensors/cache"], ["--cache", "can be written"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_one_message(case, clip, folder, demo, cache, tmp_path, capsys, monkeypatch) -> None:
    save_file({name: value.clone() for name, value in clip.state_dict().items()}, tmp_path / "weights.safetensors")
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"a": Payload(tmp_path / "ran")}))
    shutil.copytree(folder, tmp_path / "run" / "stages" / folder.name)
    shutil.copytree(folder, tmp_path / "padded")
    shutil.copytree(demo / "zero_shot" / "test", tmp_path / "few")
    (tmp_path / "few" / "classnames.txt").write_text("a\nb\n")
    document = json.loads((folder / "open_clip_config.json").read_text())
    document["preprocess_cfg"]["resize_mode"] = "longest"
    (tmp_path / "padded" / "open_clip_config.json").write_text(json.dumps(document))
    arguments, expected = CASES[case]
    arguments = [argument.format(tmp=tmp_path, folder=folder) for argument in arguments]
    for option, value in (("--data", str(demo / "zero_shot" / "test")), ("--cache", str(cache))):
        arguments += [] if option in arguments else [option, value]
    status, out, err = call(capsys, monkeypatch, *arguments)
    assert (status, out) == (2, ""), err
    for part in ("given", "allowed", "fix", *expected):
        assert part in err
    assert "Traceback" not in err
    assert not (tmp_path / "ran").exists()


def test_a_file_of_evaluators_gives_one_table_with_the_mean(
    folder: Path, demo: Path, retrieval: Path, cache: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    file = tmp_path / "sets.yaml"
    file.write_text(
        'test: {type: zero_shot, data: "{root}/zero_shot/test"}\n'
        'validation: {type: zero_shot, data: "{root}/zero_shot/validation"}\n'
        f"coco: {{type: retrieval, data: {retrieval}, captions: txt|lines}}\n"
    )
    arguments = [folder, "--evaluators", file, "--root", f"{demo}/", "--cache", cache]
    status, out, err = call(capsys, monkeypatch, *arguments, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["results"] == []
    assert set(found["metrics"]) >= {"test/top1", "validation/top5", "coco/i2t_r10"}
    alone = raychain.evaluate(str(folder), str(demo / "zero_shot" / "test"), cache=str(cache))
    assert found["metrics"]["test/top1"] == alone["results"][0]["metrics"]["zero_shot_top1"]
    status, out, _ = call(capsys, monkeypatch, *arguments)
    mean = (found["metrics"]["test/top1"] + found["metrics"]["validation/top1"]) / 2
    [line] = [line for line in out.splitlines() if line.startswith("mean of 2 × zero shot top1")]
    assert abs(float(line.split()[-1]) - mean) < 0.06


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--evaluators", "vtab-pus"], "did you mean vtab-plus"),
        (["--evaluators", "vtab-plus"], "evaluators.root"),
        (["--evaluators", "vtab-plus", "--root", "nowhere"], "nowhere/wds_imagenet1k"),
        (["--root", "data", "--data", "data"], "--root"),
        ([], "nothing to measure on"),
    ],
)
def test_what_is_wrong_with_evaluators_is_one_message(
    folder: Path, cache: Path, capsys: Any, monkeypatch: Any, arguments: list[str], said: str
) -> None:
    status, _, err = call(capsys, monkeypatch, folder, *arguments, "--cache", cache)
    assert status == 2
    assert said in err


def test_an_experiment_takes_the_evaluators_of_a_file() -> None:
    from raychain.config.loading import validate

    tree = {"name": "x", "data": {"train": "d"}, "chain": [{"model": "CoM-micro-T", "epochs": 1}]}
    listed = {"file": "vtab-plus", "root": "s3://bucket/wds/", "cars": {"type": "zero_shot", "data": "mine"}}
    found = validate(tree | {"evaluate": listed | {"score": "imagenet1k/top1"}}).evaluate
    assert len(found.named) == 38
    assert found.named["imagenet1k"].data == "s3://bucket/wds/wds_imagenet1k"
    assert found.named["cars"].data == "mine"
    assert validate(tree | {"evaluate": found.model_dump(mode="json")}).evaluate == found
