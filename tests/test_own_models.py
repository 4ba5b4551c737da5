"""A user's own models: a folder of open_clip configs, known to driver, workers and every command."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import yaml

from raychain.cli.evaluate import evaluate_command
from raychain.cli.grow import grow_command
from raychain.cli.plan import plan_command
from raychain.cli.program import main
from raychain.cli.run import run_command
from raychain.config import opened
from raychain.config.loading import validate
from raychain.errors import InputError
from raychain.models import UnknownModelError, build, model_config, model_names
from raychain.models.registry import own_configs, use_models
from raychain.paradigms import make_paradigm
from raychain.paradigms.task import Task
from raychain.runs.checks import check_chain
from raychain.runs.driver import run_chain
from raychain.runs.resolve import dry_plan, make_task
from raychain.searching.continuing import identity
from raychain.searching.request import plan_search
from raychain.searching.space import make_space
from raychain.training.artifact import write_artifact

SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def larger(config: dict[str, Any], width: int = 96) -> dict[str, Any]:
    config = deepcopy(config)
    config["vision_cfg"]["width"] = width
    return config


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Both registries as they were, after each test."""
    import open_clip.factory as factory

    paths, configs = list(factory._MODEL_CONFIG_PATHS), dict(factory._MODEL_CONFIGS)
    yield
    use_models(None)
    factory._MODEL_CONFIG_PATHS[:], factory._MODEL_CONFIGS = paths, configs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "own"
    path.mkdir()
    (path / "mine-S.json").write_text(json.dumps(SMALL))
    (path / "mine-M.json").write_text(json.dumps(larger(SMALL)))
    return path


def with_own(tree: dict[str, Any], folder: Path | None, *models: str) -> dict[str, Any]:
    lengths = ("6 steps", "4 steps")
    chain = [{"model": model, "epochs": length} for model, length in zip(models, lengths, strict=False)]
    return tree | {"chain": chain} | ({"models": str(folder)} if folder else {})


def call(command: Any, capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["raychain", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main(command, "raychain")
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err


def test_workers_know_the_models_by_their_configs_alone(ray_session, tree, folder) -> None:
    """The folder is gone before Ray is asked for anything."""
    experiment = opened(validate(with_own(tree, folder, "mine-S", "mine-M")))
    check_chain(experiment)
    task = make_task(experiment, f"{tree['storage']}/own")
    shutil.rmtree(folder)
    run = run_chain(task)
    assert [stage.status for stage in run.stages] == ["trained", "trained"]
    assert all(stage.metrics["zero_shot_top5"] >= 0 for stage in run.stages)
    trained = open_clip.create_model_and_transforms(f"local-dir:{tree['storage']}/own/stages/1-mine-M")[0]
    assert trained.visual.conv1.out_channels == 96


def test_a_model_with_a_bias_of_siglips_trains_with_clips_loss() -> None:
    """Every parameter that is to be trained gets a gradient: DistributedDataParallel waits for them all."""
    clip, config = make_paradigm(Task()), SMALL | {"init_logit_bias": -10}
    objective = clip.objective(clip.build(config, size=32, seed=0), config)
    objective.loss(objective(clip.example(config, 32, 4)).task, 4).backward()
    assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []


def test_what_is_registered_with_open_clip_in_the_drivers_process_is_known_too(tree, folder) -> None:
    open_clip.add_model_config(folder)
    check_chain(opened(validate(with_own(tree, None, "mine-S", "mine-M"))))
    assert model_config("mine-S") == SMALL
    assert own_configs(["mine-S", "CoM-micro-S", "resnet18", "timm/resnet18", "RN50"]) == {"mine-S": SMALL}


def test_keys_hold_the_config_and_neither_path_nor_name(tree, folder, tmp_path) -> None:
    def keys(folder: Path, *models: str) -> list[str]:
        return [s.key for s in make_task(opened(validate(with_own(tree, folder, *models))), str(tmp_path / "o")).stages]

    before = keys(folder, "mine-S", "mine-M")
    elsewhere = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    (elsewhere / "mine-S.json").rename(elsewhere / "renamed.json")
    (elsewhere / "unrelated.json").write_text(json.dumps(larger(SMALL, 128)))
    assert keys(elsewhere, "renamed", "mine-M") == before
    (elsewhere / "renamed.json").write_text(json.dumps(SMALL | {"quick_gelu": True}))
    assert keys(elsewhere, "renamed", "mine-M")[0] != before[0]


def test_a_changed_file_is_read_again_in_the_same_process(tree, folder) -> None:
    first = dry_plan(opened(validate(with_own(tree, folder, "mine-S"))))["stages"][0]
    (folder / "mine-S.json").write_text(json.dumps(larger(SMALL, 128)))
    again = dry_plan(opened(validate(with_own(tree, folder, "mine-S"))))["stages"][0]
    assert again["params"] > first["params"]
    assert again["macs"] > first["macs"]
    opened(validate(with_own(tree, None, "CoM-micro-S")))
    assert "mine-S" not in model_names()


def test_families_and_searches_find_them_by_patterns(tree, folder) -> None:
    search = {"metric": "zero_shot_top1", "space": {"models": "mine-*"}}
    experiment = opened(validate(with_own(tree, folder, "mine-S") | {"search": search}))
    space = make_space(experiment)
    assert [size.name for size in space.sizes] == ["mine-S", "mine-M"]
    tree["chain"] = []
    family = {name: value for name, value in with_own(tree, folder).items() if name != "chain"} | {"family": "mine-*"}
    assert opened(validate(family)).family == ("mine-*",)
    before = identity(plan_search(experiment, f"{tree['storage']}/a", tree["storage"]))
    elsewhere = shutil.copytree(folder, folder.parent / "elsewhere")
    moved = opened(experiment, models=str(elsewhere))
    assert identity(plan_search(moved, f"{tree['storage']}/a", tree["storage"])) == before
    (folder / "mine-M.json").write_text(json.dumps(larger(SMALL, 128)))
    changed = opened(experiment)
    assert identity(plan_search(changed, f"{tree['storage']}/a", tree["storage"])) != before


def test_commands_take_the_folder(tree, folder, tmp_path, capsys, monkeypatch) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(with_own(tree, None, "mine-S", "mine-M")))
    status, _, err = call(run_command, capsys, monkeypatch, file, "--dry-run")
    assert (status, "--models FOLDER" in err) == (2, True)
    status, out, err = call(run_command, capsys, monkeypatch, file, "--dry-run", "--models", folder)
    assert (status, "mine-M" in out) == (0, True), err
    family = {k: v for k, v in tree.items() if k != "chain"} | {"family": ["mine-*"]}
    file.write_text(yaml.safe_dump(family))
    limits = ["--set", "allocation.ratios=[1, 100]"]
    status, out, err = call(plan_command, capsys, monkeypatch, file, "--models", folder, "--json", *limits)
    assert status == 0, err
    assert json.loads(out)["stages"][-1]["model"] == "mine-M"


def test_checkpoints_of_own_models_are_named_and_grown(folder, demo, tmp_path, capsys, monkeypatch) -> None:
    use_models(folder)
    stage, weights = tmp_path / "stage", tmp_path / "weights.safetensors"
    stage.mkdir()
    write_artifact(stage, make_paradigm(Task()), build("mine-S", seed=0), SMALL, 32)
    shutil.copy(stage / "open_clip_model.safetensors", weights)
    use_models(None)
    data = ["--data", demo / "zero_shot" / "test", "--cache", tmp_path / "cache"]
    status, out, err = call(
        evaluate_command, capsys, monkeypatch, weights, "--model", "mine-S", "--models", folder, *data, "--json"
    )
    assert status == 0, err
    assert json.loads(out)["image_size"] == 32
    grown = [weights, "--from", "mine-S", "--to", "mine-M", "--models", folder, "--out", tmp_path / "grown"]
    status, _, err = call(grow_command, capsys, monkeypatch, *grown)
    assert status == 0, err
    assert open_clip.create_model(f"local-dir:{tmp_path / 'grown'}").visual.conv1.out_channels == 96


def changed(**keys: Any) -> bytes:
    return json.dumps(SMALL | keys).encode()


WRONG: dict[str, tuple[str, bytes, str]] = {
    "no JSON": ("a.json", b"{", "not JSON"),
    "no text": ("a.json", b"\xff\xfe\x00", "not JSON"),
    "deep": ("a.json", b"[" * 100_000, "not JSON"),
    "NaN": ("a.json", b'{"embed_dim": NaN}', "NaN"),
    "twice": ("a.json", b'{"embed_dim": 1, "embed_dim": 2}', "twice"),
    "a list": ("a.json", b"[]", "no config of a model"),
    "missing keys": ("a.json", b'{"embed_dim": 32}', "lacks"),
    "unknown key": ("a.json", changed(tower="x"), "tower: a key that open_clip"),
    "unknown key below": ("a.json", changed(text_cfg={"widht": 3}), "text_cfg.widht"),
    "wrong type": ("a.json", changed(embed_dim="32"), "embed_dim: '32'"),
    "no tower": ("a.json", changed(vision_cfg=None), "vision_cfg"),
    "huge": ("a.json", changed(text_cfg={"layers": 10**12}), "layers"),
    "large file": ("a.json", b" " * 2**21, "larger than"),
    "shadows raychain": ("CoM-micro-S.json", changed(), "another model already"),
    "shadows open_clip": ("RN50.json", changed(), "another model already"),
    "shadows timm": ("resnet18.json", changed(), "another model already"),
    "a pattern": ("mine[*].json", changed(), "a name that is no model's"),
    "a line": ("a\nb.json", changed(), "a name that is no model's"),
    "tokens without embedding": ("mine-S.json", changed(text_cfg={"vocab_size": 9}), "vocab_size"),
    "heads that do not divide": ("mine-S.json", changed(text_cfg={"width": 33, "heads": 2}), "cannot build"),
    "no vector": ("mine-S.json", changed(vision_cfg=SMALL["vision_cfg"] | {"output_tokens": True}), "image tower"),
    "weights to download": (
        "mine-S.json",
        changed(vision_cfg={"timm_model_name": "resnet18", "timm_model_pretrained": True, "image_size": 32}),
        "pretrained weights",
    ),
    "a trunk of a hub": ("mine-S.json", changed(vision_cfg={"timm_model_name": "hf-hub:a/b"}), "hf-hub:a/b"),
    "a local trunk": ("mine-S.json", changed(vision_cfg={"timm_model_name": "local-dir:/tmp"}), "local-dir"),
    "a tokenizer's file": (
        "mine-S.json",
        changed(text_cfg=SMALL["text_cfg"] | {"tokenizer_kwargs": {"bpe_path": "/dev/zero"}}),
        "bpe_path",
    ),
    "a hub's text tower": ("mine-S.json", changed(text_cfg={"hf_model_name": "a/b"}), "Hugging Face"),
    "long pictures": ("mine-S.json", changed(vision_cfg=SMALL["vision_cfg"] | {"image_size": [32, 64]}), "square"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_folder_is_one_message(case, tree, folder, tmp_path, capsys, monkeypatch) -> None:
    name, content, says = WRONG[case]
    (folder / name).write_bytes(content)
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(with_own(tree, folder, "mine-S")))
    status, out, err = call(run_command, capsys, monkeypatch, file, "--dry-run")
    assert (status, out) == (2, ""), err
    assert says in err
    assert "Traceback" not in err
    assert err.count("\n") <= 5


@pytest.mark.parametrize("kind", ["none", "empty", "pipe", "s3", "user", "nul"])
def test_folders_that_are_none(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "models"
    if kind in ("empty", "pipe"):
        path.mkdir()
        (path / "._mine-S.json").write_bytes(b"macOS leaves these")
    if kind == "pipe":
        os.mkfifo(path / "a.json")
    source = {"s3": "s3://bucket/models", "user": "~nobody-of-that-name/x", "nul": "a\0b"}.get(kind, str(path))
    with pytest.raises(InputError, match="models"):
        use_models(source)


def test_a_copy_of_a_known_config_and_a_single_file_are_fine(folder, tmp_path) -> None:
    shutil.copy(Path(open_clip.__file__).parent / "model_configs" / "ViT-B-32.json", folder)
    use_models(folder)
    assert {"mine-S", "ViT-B-32"} <= set(model_names())
    use_models(folder / "mine-S.json")
    assert "mine-S" in model_names()
    assert "mine-M" not in model_names()


def test_a_known_name_registered_with_other_content_is_refused(folder) -> None:
    (folder / "CoM-micro-S.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(folder)
    with pytest.raises(UnknownModelError, match="give your model another name"):
        model_config("CoM-micro-S")
