"""Chains that begin with a checkpoint, and stages that start from one."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import raychain
from raychain.config.loading import validate
from raychain.errors import InputError
from raychain.models import build, model_config
from raychain.paradigms import make_paradigm
from raychain.paradigms.task import Task
from raychain.runs.origins import named
from raychain.runs.resolve import make_task
from raychain.searching.space import make_space

SMALL, LARGE = "CoM-micro-T", "CoM-micro-S"
OWN = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
"""As open_clip's ViT-S-16 is written, and tiny."""


def saved(folder: Path, model: str = SMALL, seed: int = 3, mean: tuple[float, ...] = ()) -> Path:
    """A checkpoint in open_clip's folder form."""
    folder.mkdir(parents=True)
    paradigm, made = make_paradigm(Task()), build(model, seed=seed)
    if mean:
        made.visual.preprocess_cfg["mean"] = mean
    paradigm.save(folder, made, model_config(model), made.visual.image_size)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of such a folder."""
    found: dict[str, torch.Tensor] = load_file(folder / "open_clip_model.safetensors")
    return found


def keys(tree: dict[str, Any], out: Path) -> list[str]:
    """The keys of an experiment's stages."""
    return [stage.key for stage in make_task(named(validate(tree)), str(out)).stages]


def chain(tree: dict[str, Any], first: dict[str, Any] | Path, **second: Any) -> dict[str, Any]:
    """The experiment with a checkpoint as its first stage."""
    own = {"checkpoint": str(first)} if isinstance(first, Path) else first
    return tree | {"chain": [own, {"model": LARGE, "epochs": "12 steps"} | second]}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A checkpoint."""
    return saved(tmp_path / "mine" / "my-clip")


def test_the_content_of_a_checkpoint_is_in_the_keys_and_neither_its_place_nor_its_form(
    tree: dict[str, Any], mine: Path, tmp_path: Path
) -> None:
    expected = keys(chain(tree, mine), tmp_path / "out")
    shutil.copytree(mine, tmp_path / "copy")
    shutil.copy(mine / "open_clip_model.safetensors", tmp_path / "alone.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights(mine).items()}}, tmp_path / "alone.pt")
    for place in (tmp_path / "copy", tmp_path / "copy" / "open_clip_model.safetensors"):
        assert keys(chain(tree, place), tmp_path / "out") == expected
    for name in ("alone.safetensors", "alone.pt"):
        first = {"checkpoint": str(tmp_path / name), "model": SMALL}
        assert keys(chain(tree, first), tmp_path / "out") == expected
    changed = weights(mine)
    changed["logit_scale"] += 1e-3
    save_file(changed, tmp_path / "alone.safetensors")
    other = keys(chain(tree, {"checkpoint": str(tmp_path / "alone.safetensors"), "model": SMALL}), tmp_path / "out")
    assert other[0] != expected[0]
    assert other[1] != expected[1], "and so all that grows from it is other"
    alone = keys(tree | {"chain": [{"model": LARGE, "epochs": "12 steps"}]}, tmp_path / "out")
    started = keys(tree | {"chain": [{"model": LARGE, "epochs": "12 steps", "start": str(mine)}]}, tmp_path / "out")
    assert len({alone[0], started[0], expected[1]}) == 3


def test_a_model_that_nobody_knows_is_taken_from_the_checkpoint_and_named_after_it(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "own-S.json").write_text(json.dumps(OWN))
    from raychain.models.registry import use_models

    use_models(tmp_path / "configs")
    folder = saved(tmp_path / "my clip", "own-S")
    assert named(validate(chain(tree, folder))).chain[0].model == "own-S"
    use_models(None)
    named_after = named(validate(chain(tree, folder)))
    assert named_after.chain[0].model == "my_clip"
    assert make_task(named_after, str(tmp_path / "out")).stages[0].size == 32
    use_models(None)


def test_a_checkpoint_of_another_paradigm_keeps_its_name_and_bias(tree: dict[str, Any], tmp_path: Path) -> None:
    siglip = tree | {"task": {"paradigm": "siglip"}}
    paradigm = make_paradigm(validate(siglip).task)
    config = paradigm.config(SMALL)
    size = paradigm.native_size(config)
    (tmp_path / "sig").mkdir()
    paradigm.save(tmp_path / "sig", paradigm.build(config, size=size, seed=3), config, size)
    task = make_task(named(validate(chain(siglip, tmp_path / "sig"))), str(tmp_path / "out"))
    assert task.stages[0].model == SMALL
    alone = tmp_path / "sig" / "open_clip_model.safetensors"
    shutil.move(alone, tmp_path / "alone.safetensors")
    first = {"checkpoint": str(tmp_path / "alone.safetensors"), "model": SMALL}
    assert keys(chain(siglip, first), tmp_path / "out") == [stage.key for stage in task.stages]
    with pytest.raises(InputError, match="logit_bias"):
        keys(chain(tree, first), tmp_path / "out")


def test_pictures_stay_normalised_as_the_checkpoint_has_them(tree: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path / "other", mean=(0.1, 0.2, 0.3))
    task = make_task(named(validate(chain(tree, folder))), str(tmp_path / "out"))
    for stage in task.stages:
        model = task.paradigm.build(stage.config, size=stage.size, seed=0)
        assert task.paradigm.normalisation(model)[0] == pytest.approx((0.1, 0.2, 0.3))


def test_a_plan_names_what_it_does_not_count(tree: dict[str, Any], mine: Path, tmp_path: Path) -> None:
    from rich.console import Console

    from raychain.reporting.plan_table import plan_table

    alone = raychain.plan(validate(tree | {"chain": [{"model": LARGE, "epochs": "12 steps"}]}))
    plan = raychain.plan(validate(chain(tree, mine)))
    given, grown = plan["stages"]
    assert (given["model"], given["macs"], given["epochs"], given["memory_bytes"]) == (SMALL, 0, 0, None)
    assert given["origin"] == {"checkpoint": str(mine), "model": SMALL}
    assert plan["macs"] == grown["macs"] > alone["macs"], "it follows a teacher"
    assert plan["baseline"]["macs"] == alone["macs"]
    assert any("baseline" in warning for warning in plan["warnings"])
    text = Console(file=io.StringIO(), width=200)
    plan_table(plan, text)
    assert f"{SMALL} given: my-clip, its own training is not in the totals" in text.file.getvalue()  # type: ignore[attr-defined]
    started = raychain.plan(validate(tree | {"chain": [{"model": LARGE, "epochs": "12 steps", "start": str(mine)}]}))
    assert started["stages"][0]["macs"] == grown["macs"]


def _wrong(case: str, mine: Path) -> Any:
    """The first stage, or the whole chain, of an experiment that is refused."""
    tensors, broken = weights(mine), mine.parent / "broken.safetensors"
    named_small = {"checkpoint": str(broken), "model": SMALL}
    match case.removeprefix("start "):
        case "not finite":
            tensors["visual.proj"][0, 0] = float("nan")
            save_file(tensors, broken)
        case "of another model":
            save_file(tensors, broken)
            named_small["model"] = LARGE
        case "its config is of another model":
            return {"checkpoint": str(mine), "model": LARGE}
        case "cut off":
            broken.write_bytes((mine / "open_clip_model.safetensors").read_bytes()[:5000])
        case "no model named":
            save_file(tensors, broken)
            return {"checkpoint": str(broken)}
        case "missing":
            return {"checkpoint": str(mine.parent / "nowhere"), "model": SMALL}
        case "a name":
            return {"checkpoint": "hf-hub:someone/model", "model": SMALL}
        case "a model's name":
            return {"checkpoint": "ViT-B-32"}
        case "a run folder":
            (mine.parent / "run" / "stages" / "0-S").mkdir(parents=True)
            return {"checkpoint": str(mine.parent / "run"), "model": SMALL}
        case "smaller than the checkpoint":
            return {"checkpoint": str(saved(mine.parent / "large", "CoM-micro-M"))}
    return named_small


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("not finite", ["chain.0.checkpoint", "visual.proj", "not finite"]),
        ("of another model", ["chain.0.checkpoint", f"is not {LARGE}"]),
        ("its config is of another model", ["chain.0.checkpoint", f"of another model than {LARGE}"]),
        ("cut off", ["chain.0.checkpoint", "cannot be read"]),
        ("no model named", ["chain.0.model", "does not say which model it is", "model: NAME"]),
        ("missing", ["chain.0.checkpoint", "does not exist"]),
        ("a name", ["chain.0.checkpoint", "nothing is downloaded"]),
        ("a model's name", ["chain.0.checkpoint", "nothing is downloaded"]),
        ("a run folder", ["chain.0.checkpoint", "this is a run folder", "0-S"]),
        ("smaller than the checkpoint", ["chain.1.model", "growing order"]),
        ("start not finite", ["chain.0.start", "visual.proj", "not finite"]),
        ("start no model named", ["chain.0.start.model", "does not say which model it is"]),
        ("start smaller than the checkpoint", ["chain.0.model", "growing order"]),
    ],
)
def test_a_checkpoint_that_is_of_no_use_is_refused_before_anything_starts(
    tree: dict[str, Any], mine: Path, tmp_path: Path, case: str, words: list[str]
) -> None:
    first = _wrong(case, mine)
    if case.startswith("start "):
        given = tree | {"chain": [{"model": LARGE, "epochs": "12 steps", "start": first}]}
    else:
        given = chain(tree, first)
    with pytest.raises(InputError) as caught:
        raychain.run(validate(given), out=str(tmp_path / "out"))
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_stage_of_the_run_itself_is_refused_before_it_makes_way(tree: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path / "out" / "stages" / f"0-{SMALL}")
    with pytest.raises(InputError, match="outside of the run's own folder"):
        raychain.run(validate(chain(tree, folder)), out=str(tmp_path / "out"))
    assert (folder / "open_clip_model.safetensors").exists()


def test_a_checkpoint_is_refused_where_the_images_do_not_fit_it(tree: dict[str, Any], mine: Path) -> None:
    given = chain(tree, mine)
    with pytest.raises(InputError, match=r"data\.image_size"):
        raychain.run(validate(given | {"data": given["data"] | {"image_size": 33}}))


@pytest.mark.parametrize(
    ("stages", "where", "words"),
    [
        ([{"checkpoint": "x", "model": SMALL, "epochs": 2}, {"model": LARGE, "epochs": 1}], "chain.0.epochs", "start"),
        ([{"checkpoint": "x", "lr": 1e-3}, {"model": LARGE, "epochs": 1}], "chain.0.lr", "`model` alone"),
        ([{"model": SMALL, "epochs": 1}, {"checkpoint": "x"}], "chain.1.checkpoint", "`start: x`"),
        ([{"checkpoint": "x"}], "chain", "at least one stage to train"),
        ([{"model": SMALL}], "chain.0.epochs", "required"),
        ([{"epochs": 1}], "chain.0.model", "required"),
        ([{"model": SMALL, "epochs": 1, "start": {"chekpoint": "x"}}], "chain.0.start.chekpoint", "checkpoint?"),
    ],
)
def test_checkpoints_in_the_wrong_place_are_told_where_they_belong(
    tree: dict[str, Any], stages: list[Any], where: str, words: str
) -> None:
    with pytest.raises(InputError) as caught:
        validate(tree | {"chain": stages})
    assert f"experiment: {where}\n" in str(caught.value)
    assert words in str(caught.value)


def test_a_search_refuses_chains_with_checkpoints(tree: dict[str, Any], mine: Path) -> None:
    with pytest.raises(InputError, match=r"chain\.0\.checkpoint"):
        make_space(validate(chain(tree, mine)))


def test_a_chain_begins_with_a_folder_and_starts_a_stage_from_another_run(
    ray_session: None, finished: Any, tree: dict[str, Any], mine: Path, tmp_path: Path, capsys: Any
) -> None:
    """The given model is measured as a stage is, what grows from it begins as its function, and moments are taken."""
    _, before, _ = finished
    other = before / "stages" / "1-CoM-micro-M"
    last = {"model": "CoM-micro-L", "epochs": "4 steps", "start": str(other), "lr": 1e-6, "warmup": "1 steps"}
    given = chain(tree, mine, lr=1e-6) | {"transfer": {"optimizer": "grow"}, "name": "mine"}
    given["chain"] = [*given["chain"], last]
    run = raychain.run(validate(given))
    out = Path(given["storage"]) / "mine"
    first, grown, started = run["stages"]
    assert [stage["status"] for stage in run["stages"]] == ["given", "trained", "trained"]
    assert (first["macs"], first["model"], first["origin"]["checkpoint"]) == (0, SMALL, str(mine))
    assert started["origin"]["model"] == "CoM-micro-M"
    assert run["totals"]["macs"] == grown["macs"] + started["macs"]
    measured = raychain.evaluate(str(mine), given["evaluate"]["zero_shot"], cache=given["preload"]["cache"])
    assert first["metrics"]["zero_shot_top1"] == pytest.approx(measured["results"][0]["metrics"]["zero_shot_top1"])
    assert grown["metrics"]["zero_shot_top1"] == pytest.approx(first["metrics"]["zero_shot_top1"], abs=5)
    trained = json.loads((other / "stage.json").read_text())["metrics"]["zero_shot_top1"]
    assert started["metrics"]["zero_shot_top1"] == pytest.approx(trained, abs=5)
    assert (out / "stages" / "2-start-CoM-micro-M" / "optimizer.safetensors").exists(), "its moments were grown"
    said = capsys.readouterr().err
    assert "my-clip has no AdamW moments (optimizer.safetensors): those of CoM-micro-S begin at zero" in said
    assert "1-CoM-micro-M has no AdamW moments" not in said
    for text in (said, (out / "report.html").read_text()):
        assert f"{SMALL} given: my-clip, its own training is not in the totals" in text
        assert "CoM-micro-L starts from CoM-micro-M given: 1-CoM-micro-M, its own training" in text
    again = raychain.run(validate(given))
    assert [stage["status"] for stage in again["stages"]] == ["given", "reused", "reused"]
    assert again["stages"][0]["metrics"] == first["metrics"]
    elsewhere = raychain.run(validate(given | {"name": "other"}))
    assert [stage["status"] for stage in elsewhere["stages"]] == ["given", "reused", "reused"], "from the store"


@pytest.mark.long
@pytest.mark.parametrize("form", ["safetensors", "remote stage"])
def test_a_weights_file_of_a_model_of_ones_own_and_a_stage_on_object_storage_begin_chains(
    ray_session: None, finished: Any, bucket: Any, tree: dict[str, Any], tmp_path: Path, form: str
) -> None:
    larger = {**OWN, "vision_cfg": {**OWN["vision_cfg"], "width": 128, "layers": 3}}
    (tmp_path / "configs").mkdir()
    for name, config in (("own-S-16", OWN), ("own-M-16", larger)):
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(config))
    if form == "safetensors":
        from raychain.models.registry import use_models

        use_models(tmp_path / "configs")
        save_file(weights(saved(tmp_path / "made", "own-S-16")), tmp_path / "mine.safetensors")
        use_models(None)
        stages = [{"checkpoint": str(tmp_path / "mine.safetensors"), "model": "own-S-16"},
                  {"model": "own-M-16", "epochs": "8 steps"}]  # fmt: skip
        given = tree | {"chain": stages, "models": str(tmp_path / "configs")}
    else:
        from pyarrow import fs

        from raychain.core.storage import Folder

        _, before, _ = finished
        address = bucket("runs/tiny/stages/0-CoM-micro-S")
        remote = Folder(address)
        for file in (before / "stages" / "0-CoM-micro-S").iterdir():
            remote.write(file.name, file.read_bytes())
        assert remote.fs.get_file_info(remote.path).type == fs.FileType.Directory
        given = tree | {"chain": [{"checkpoint": address}, {"model": "CoM-micro-M", "epochs": "8 steps"}]}
    run = raychain.run(validate(given))
    assert [stage["status"] for stage in run["stages"]] == ["given", "trained"]
    assert all(stage["metrics"]["zero_shot_top1"] is not None for stage in run["stages"])
    if form != "safetensors":
        assert run["stages"][0]["model"] == "CoM-micro-S"
        expected = json.loads((before / "stages" / "0-CoM-micro-S" / "stage.json").read_text())["metrics"]
        assert run["stages"][0]["metrics"]["i2t_r1"] == pytest.approx(expected["i2t_r1"])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_killed_chain_that_begins_with_a_checkpoint_goes_on_to_the_same_result(
    tree: dict[str, Any], mine: Path, tmp_path: Path
) -> None:
    given = chain(tree, mine, epochs="120 steps") | {"checkpoint": {"every": "10 steps"}, "evaluate": {}}
    given["chain"] = [*given["chain"], {"model": "CoM-micro-M", "epochs": "8 steps", "start": str(mine)}]
    del given["storage"]  # or the second run takes the stages of the first
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(given))

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "raychain.run", str(tmp_path / "chain.yaml"), "--json", "--out", str(out)]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, capture_output=True)
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    until = time.monotonic() + 200
    while time.monotonic() < until and not list(killed.glob("checkpoints/1-*/*/state.json")):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "stages" / f"1-{LARGE}" / "stage.json").exists(), "it was killed before the stage's end"
    subprocess.run(command(killed), check=True, capture_output=True)
    runs = [json.loads((out / "run.json").read_text()) for out in (whole, killed)]
    first, second = ([stage["key"] for stage in run["stages"]] for run in runs)
    assert first == second
    last = [load_file(out / "stages" / f"1-{LARGE}" / "open_clip_model.safetensors") for out in (whole, killed)]
    for name, value in last[0].items():
        torch.testing.assert_close(last[1][name], value, rtol=1e-5, atol=1e-6)
