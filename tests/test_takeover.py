"""Keys hold what determines a result and no machine; stages of schema 2 count unless their data was touched."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import fs

import raychain
from raychain import records
from raychain.config.loading import validate
from raychain.core.storage import Folder, below
from raychain.errors import InputError, RunFailed
from raychain.runs import driver
from raychain.runs.checks import check_compute
from raychain.runs.resolve import dry_plan, make_task
from raychain.runs.store import StageStore
from raychain.runs.takeover import take_over
from raychain.searching.continuing import identity
from raychain.searching.request import plan_search
from raychain.training.task import ChainTask

FILES = {"open_clip_config.json": b"{}", "open_clip_model.safetensors": b"weights"}
STAGES = ("0-CoM-micro-S", "1-CoM-micro-M")


def task_of(tree: dict[str, Any], out: Path) -> ChainTask:
    return make_task(validate(tree), str(out), store=tree["storage"])


def leave(out: Path, task: ChainTask) -> None:
    """What schema 2 left of the finished chain in the run folder and the store, as far as it is looked at."""
    files = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    for stage in task.stages:
        own = {"index": stage.index, "model": stage.model, "steps": stage.steps, "epochs": stage.epochs, "wall_s": 0.1}
        held_out = {"metrics": {"zero_shot_top1": 40.0 + stage.index}, "evaluation": task.suite.former}
        more = {"status": "trained", "params": stage.params, "macs": stage.macs, "checkpoint": f"stages/{stage.folder}"}
        record = {"key": stage.former.key, **own, **held_out, **more, "files": files}
        for folder in (out / "stages" / stage.folder, out.parent / "store" / stage.former.key):
            folder.mkdir(parents=True)
            for name, content in FILES.items():
                (folder / name).write_bytes(content)
            (folder / "stage.json").write_text(json.dumps(record))
    lines = [{"stage": stage.index, "step": 4, "time": time.time() - 0.2} for stage in task.stages]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def keys(out: Path) -> list[str]:
    return [json.loads((out / "stages" / name / "stage.json").read_text())["key"] for name in STAGES]


def correct(folder: Path, extension: str) -> None:
    """Changes a byte in the middle of a shard, at the same size, and puts its time back."""
    path = sorted(folder.glob("*.tar"))[0]
    with tarfile.open(path) as tar:
        middle = path.stat().st_size // 4
        member = next(m for m in tar if m.name.endswith(extension) and m.offset_data > max(middle, 70_000))
    stat, data = path.stat(), path.read_bytes()
    place = member.offset_data
    path.write_bytes(data[:place] + (b"2" if data[place] == ord("1") else b"1") + data[place + 1 :])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture
def out(tree: dict[str, Any], demo: Path, tmp_path: Path) -> Path:
    """The run folder of a chain that schema 2 trained."""
    made = max(path.stat().st_ctime for path in demo.rglob("*.tar"))
    while time.time() < made + 0.5:
        time.sleep(0.1)
    folder = tmp_path / "runs" / "tiny"
    leave(folder, task_of(tree, folder))
    return folder


@pytest.fixture
def own(tree: dict[str, Any], demo: Path, tmp_path: Path) -> Callable[[], dict[str, Any]]:
    """The experiment on a copy of its data, which a test may change."""

    def copied() -> dict[str, Any]:
        shutil.copytree(demo, tmp_path / "data")
        changed = deepcopy(tree)
        changed["data"]["train"] = str(tmp_path / "data" / "train")
        changed["evaluate"] = {"zero_shot": f"{tmp_path}/data/zero_shot/test", "retrieval": f"{tmp_path}/data/test"}
        return changed

    return copied


# Keys


@pytest.mark.parametrize("folder", ["train", "test", "zero_shot/test/test"])
def test_a_corrected_shard_makes_other_stages_or_other_measurements(
    tree: dict[str, Any], own: Callable[[], dict[str, Any]], tmp_path: Path, folder: str
) -> None:
    """A copy of the data is the same data."""
    first, copy = task_of(tree, tmp_path / "out"), own()
    before = task_of(copy, tmp_path / "out")
    assert [stage.key for stage in before.stages] == [stage.key for stage in first.stages]
    assert before.suite.digest == first.suite.digest
    correct(tmp_path / "data" / folder, ".cls" if folder.startswith("zero") else ".txt")
    after = task_of(copy, tmp_path / "out")
    same = {a.key == b.key for a, b in zip(before.stages, after.stages, strict=True)}
    assert (same, after.suite.digest == before.suite.digest) == ({folder != "train"}, folder == "train")
    assert [a.former.key for a in before.stages] == [b.former.key for b in after.stages], "schema 2 saw no difference"
    assert after.suite.former == before.suite.former


def test_the_plan_as_json_shows_keys(tree: dict[str, Any], tmp_path: Path) -> None:
    stages = dry_plan(validate(tree))["stages"]
    assert [stage["key"] for stage in stages] == [stage.key for stage in task_of(tree, tmp_path / "out").stages]
    demo = {"out": str(tmp_path / "none"), "names": 30, "pictures": 900}
    unseen = tree | {"data": tree["data"] | {"demo": demo, "train": str(tmp_path / "none" / "train")}}
    assert [stage["key"] for stage in dry_plan(validate(unseen))["stages"]] == [None, None], "not rendered yet"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    budget=st.integers(1, 2**50),
    gpus=st.sampled_from([0, 1]),
    workers=st.one_of(st.integers(1, 8), st.tuples(st.integers(1, 3), st.integers(3, 8))),
    cpus=st.sampled_from([1, 3.5, 64]),
    name=st.sampled_from(["tiny", "other"]),
    every=st.sampled_from(["5 steps", "9 minutes"]),
    micro_batch=st.sampled_from([None, 1, 7]),
)
def test_no_machine_is_part_of_a_key(
    tree: dict[str, Any], tmp_path: Path, budget: int, gpus: int, workers: Any, cpus: float, name: str,
    every: str, micro_batch: int | None,
) -> None:  # fmt: skip
    other = tree | {
        "name": name,
        "compute": {"workers": workers, "gpus_per_worker": gpus, "cpus_per_worker": cpus, "max_failures": 9},
        "preload": {"cache": str(tmp_path / name), "budget": budget, "cpus": 0},
        "checkpoint": {"every": every},
        "train": tree["train"] | {"micro_batch": micro_batch, "log_every": 1},
        "storage": str(tmp_path / "elsewhere" / name),
        "evaluate": {"every": "9 steps"},
        "track": {"wandb": "project"},
    }
    first, second = task_of(tree, tmp_path / "a"), task_of(other, tmp_path / "b")
    assert [stage.key for stage in first.stages] == [stage.key for stage in second.stages]
    assert [stage.feed.reader for stage in first.stages] == [stage.feed.reader for stage in second.stages]


def test_what_is_kept_of_pictures_is_part_of_a_key(tree: dict[str, Any], tmp_path: Path) -> None:
    raw, jpeg = (task_of(tree | {"data": tree["data"] | {"store": s}}, tmp_path).stages for s in ("raw", "jpeg"))
    assert [stage.key for stage in raw] == [stage.key for stage in task_of(tree, tmp_path).stages]
    assert all(a.key != b.key for a, b in zip(raw, jpeg, strict=True))


def test_gpus_without_a_precision_are_refused_before_any_work(tree: dict[str, Any]) -> None:
    recipe = {name: value for name, value in tree["train"].items() if name != "precision"}
    asked = tree | {"train": recipe, "compute": {"gpus_per_worker": 1}}
    with pytest.raises(InputError, match=r"^train\.precision\n(.|\n)*--set train\.precision=bf16"):
        check_compute(validate(asked), "auto")
    with pytest.raises(InputError, match=r"^train\.precision\n"):
        raychain.plan(validate(asked))
    check_compute(validate(asked | {"train": recipe | {"precision": "bf16"}}), "auto")
    check_compute(validate(tree | {"train": recipe}), "auto")


def test_a_search_is_its_chains_data_and_choices_and_no_machine(
    own: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    tree = own()
    space = {"models": "CoM-micro-{S,M}", "first": "10 steps", "grown": ["4 steps", "6 steps"]}
    tree |= {"search": {"space": space, "trials": 2}}

    def found(**changes: Any) -> str:
        return identity(plan_search(validate(tree | changes), str(tmp_path / "out"), str(tmp_path)))

    before = found()
    machine = {"workers": 3, "gpus_per_worker": 1}
    assert before == found(name="other", compute=machine, storage=str(tmp_path / "b"), checkpoint={"keep": 5})
    assert before == found(preload=tree["preload"] | {"budget": 10**6}, train=tree["train"] | {"log_every": 9})
    assert before == found(search=tree["search"] | {"trials": 9, "concurrent": 3})
    for changes in (
        {"search": tree["search"] | {"seed": 1}},
        {"search": tree["search"] | {"space": space | {"alpha": [0, 2]}}},
        {"train": tree["train"] | {"lr": 2e-3}},
        {"transfer": {"distill": None}},
        {"evaluate": {"zero_shot": tree["evaluate"]["zero_shot"]}},
    ):
        assert before != found(**changes)
    correct(tmp_path / "data" / "train", ".txt")
    assert before != found()


# Taken over


def test_a_run_of_schema_2_is_done(
    out: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = task_of(tree, out)
    assert [stage["published"] for stage in dry_plan(validate(tree))["stages"]] == [True, True]
    monkeypatch.setattr(driver, "_execute", None)
    run = raychain.run(validate(tree))
    assert [stage["metrics"]["zero_shot_top1"] for stage in run["stages"]] == [40.0, 41.0]
    assert [(s["status"], s["key"], s["former"]) for s in run["stages"]] == [
        ("reused", stage.key, stage.former.key) for stage in task.stages
    ]
    said = capsys.readouterr().err
    assert said.count("taken over as") == 2
    assert raychain.run(validate(tree))["status"] == "succeeded"
    assert "taken over" not in capsys.readouterr().err
    assert sorted(path.name for path in (out / "stages").iterdir()) == list(STAGES), "nothing is set aside"


def test_a_store_of_schema_2_gives_its_stages(
    out: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "_execute", None)
    run = raychain.run(validate(tree | {"name": "another"}))
    assert [stage["metrics"]["zero_shot_top1"] for stage in run["stages"]] == [40.0, 41.0]
    assert capsys.readouterr().err.count("taken over as") == 2
    assert len([p for p in (out.parent / "store").iterdir() if not p.name.startswith(".")]) == 4


@pytest.mark.parametrize("where", ["run folder", "copied run folder", "store"])
def test_stages_whose_data_was_touched_since_are_trained_again(
    out: Path, own: Callable[[], dict[str, Any]], where: str
) -> None:
    """A copied run folder has files newer than the correction; its records tell when it was trained."""
    tree, said = own(), list[str]()
    task = task_of(tree, out)  # on data that was copied after the training
    if where == "store":
        shutil.rmtree(out / "stages")
    if where == "copied run folder":
        shutil.rmtree(out.parent / "store")
        for path in out.rglob("*"):
            os.utime(path)
    take_over(task, Folder(str(out)), StageStore(Folder(str(out.parent))), said.append)
    assert len(said) == 2
    assert re.match(r"CoM-micro-S \(stage [0-9a-f]{8}\) is trained again: .*\.tar was touched after", said[0])
    if where != "store":
        assert keys(out) == [stage.former.key for stage in task.stages], "as they were"
    assert not dry_plan(validate(tree))["stages"][1]["published"]


def test_a_stage_that_grew_from_a_retrained_one_is_trained_again(out: Path, tree: dict[str, Any]) -> None:
    task, said = task_of(tree, out), list[str]()
    first = out / "stages" / STAGES[0] / "stage.json"
    first.write_text(json.dumps(json.loads(first.read_text()) | {"key": task.stages[0].key}))  # trained by this version
    take_over(task, Folder(str(out)), None, said.append)
    assert keys(out) == [task.stages[0].key, task.stages[1].former.key]
    assert "is trained again: the stage before it is another" in said[0]


def test_a_damaged_stage_in_the_store_is_not_taken_over(out: Path, tree: dict[str, Any]) -> None:
    shutil.rmtree(out / "stages")
    task, said = task_of(tree, out), list[str]()
    (out.parent / "store" / task.stages[0].former.key / "open_clip_model.safetensors").write_bytes(b"weight?")
    store = StageStore(Folder(str(out.parent)))
    take_over(task, Folder(str(out)), store, said.append)
    assert "open_clip_model.safetensors is damaged" in said[0]
    assert not any(store.has(stage.key) for stage in task.stages)


def test_pictures_kept_otherwise_are_named(tree: dict[str, Any], tmp_path: Path) -> None:
    """Schema 2 kept JPEG where the budget was small."""
    small, out = tree | {"preload": tree["preload"] | {"budget": 10**6}}, tmp_path / "runs" / "tiny"
    task, said = task_of(small, out), list[str]()
    leave(out, task)
    take_over(task, Folder(str(out)), None, said.append)
    assert "data.store: jpeg leaves them so" in said[0]
    task = task_of(small | {"data": small["data"] | {"store": "jpeg"}}, out)
    take_over(task, Folder(str(out)), None, said.append)
    assert keys(out) == [stage.key for stage in task.stages]


def test_metrics_on_held_out_data_that_was_touched_are_not_taken_over(
    out: Path, tree: dict[str, Any], own: Callable[[], dict[str, Any]]
) -> None:
    task = task_of(tree | {"evaluate": own()["evaluate"]}, out)
    take_over(task, Folder(str(out)), None, lambda _: None)
    assert keys(out) == [stage.key for stage in task.stages]
    record = records.read(Folder(str(out)), f"stages/{STAGES[0]}/stage.json", records.StageRecord)
    assert record is not None
    assert (record.evaluation, task.measured(record)) == (task.suite.former, False)


def test_unfinished_states_of_schema_2_go_on(out: Path, tree: dict[str, Any]) -> None:
    task = task_of(tree, out)
    counters = {"step": 8, "samples": 256, "wall_s": 0.1, "data_wait_s": 0.0, "gap_s": None}
    stage, state = task.stages[1], {"counters": counters, "files": {}}
    folder = out / "checkpoints" / stage.folder / "0000000008"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state | {"key": stage.former.key}))
    shutil.rmtree(out / "stages" / stage.folder)
    shutil.rmtree(out.parent / "store")
    take_over(task, Folder(str(out)), None, lambda _: None)
    assert json.loads((folder / "state.json").read_text()) == state | {"key": stage.key, "former": stage.former.key}


# In object storage, at an address that holds a password


@pytest.fixture
def remote(tree: dict[str, Any], demo: Path, tmp_path: Path, bucket: Callable[[str], str]) -> dict[str, Any]:
    """The experiment with a storage in a bucket, where schema 2 trained it."""
    made = max(path.stat().st_ctime for path in demo.rglob("*.tar"))
    while time.time() < made + 1.5:  # S3 tells whole seconds
        time.sleep(0.1)
    changed = tree | {"storage": bucket(f"{tmp_path.name}/runs").replace("://", "://key:hunter2@", 1)}
    leave(tmp_path / "runs" / "tiny", task_of(tree, tmp_path / "runs" / "tiny"))
    for name in ("tiny", "store"):
        Folder(changed["storage"]).publish(tmp_path / "runs" / name, name, "stage.json")
    return changed


def objects(folder: Folder) -> dict[str, bytes]:
    """All files below a folder of a bucket: name → content."""
    infos = folder.fs.get_file_info(fs.FileSelector(folder.path, recursive=True))
    files = [info.path.removeprefix(f"{folder.path}/") for info in infos if info.type == fs.FileType.File]
    return {name: folder.read(name) or b"" for name in files}


@pytest.mark.parametrize("name", ["tiny", "another"])
def test_a_run_and_a_store_of_schema_2_in_a_bucket_are_done(
    remote: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "_execute", None)
    run = raychain.run(validate(remote | {"name": name}))
    folder = Folder(remote["storage"])
    assert [s["metrics"]["zero_shot_top1"] for s in run["stages"]] == [40.0, 41.0]
    assert run == folder.read_json(f"{name}/run.json")
    recorded = [folder.read_json(f"{name}/stages/{stage}/stage.json") for stage in STAGES]
    assert [(r["key"], r["former"]) for r in recorded] == [(s["key"], s["former"]) for s in run["stages"]]
    said = capfd.readouterr()
    assert said.err.count("taken over as") == 2
    assert [stage["published"] for stage in dry_plan(validate(remote | {"name": name}))["stages"]] == [True, True]
    found = objects(folder)
    assert f"{name}/report.html" in found
    assert [file for file, content in found.items() if b"hunter2" in content] == []
    assert "hunter2" not in said.out + said.err


def test_unfinished_states_of_schema_2_in_a_bucket_go_on_unless_their_data_was_touched(
    remote: dict[str, Any], own: Callable[[], dict[str, Any]]
) -> None:
    folder, touched = Folder(below(remote["storage"], "tiny")), own()
    task = make_task(validate(remote), folder.address, store=remote["storage"])
    counters = {"step": 8, "samples": 256, "wall_s": 0.1, "data_wait_s": 0.0, "gap_s": None}
    stage, said = task.stages[1], list[str]()
    folder.write_json(f"checkpoints/{stage.folder}/0000000008/state.json",
                      {"key": stage.former.key, "counters": counters, "files": {}})  # fmt: skip
    folder.delete(f"stages/{stage.folder}")
    take_over(make_task(validate(touched | {"storage": remote["storage"]}), folder.address), folder, None, said.append)
    assert re.match(r"CoM-micro-S .* is trained again: .*\.tar was touched after", said[0])
    state = f"checkpoints/{stage.folder}/0000000008/state.json"
    assert folder.read_json(state)["key"] == stage.former.key
    take_over(task, folder, None, said.append)
    assert folder.read_json(state) == {
        "key": stage.key, "counters": counters, "files": {}, "former": stage.former.key
    }  # fmt: skip


# While a run reads


def test_a_shard_that_changes_after_it_was_counted_ends_the_run(
    ray_session: None, own: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    tree, out = own(), tmp_path / "runs" / "tiny"
    tree["preload"] = {"cache": str(tmp_path / "cache")}
    task = task_of(tree, out)
    correct(tmp_path / "data" / "train", ".txt")
    with pytest.raises(RunFailed, match=r"\.tar has changed since it was counted(.|\n)*The same command again"):
        driver.run_chain(task)
    assert json.loads((out / "run.json").read_text())["restarts"] == [], "it would only come again"
