"""A whole chain on real Ray: results, reuse, world sizes, interruption, failure."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import open_clip
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

import raychain
from raychain.config.loading import validate
from raychain.data import members
from raychain.data.addresses import expand
from raychain.data.shards import read, survey
from raychain.errors import RunFailed
from raychain.runs import driver
from raychain.runs.resolve import make_task

pytestmark = pytest.mark.slow


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_chain_trains_and_its_run_folder_is_complete(finished):
    run, out, _ = finished
    assert run["status"] == "succeeded"
    assert [(s["index"], s["model"], s["status"], s["steps"], s["samples_seen"]) for s in run["stages"]] == [
        (0, "CoM-micro-S", "trained", 24, 24 * 32),
        (1, "CoM-micro-M", "trained", 16, 16 * 32),
    ]
    assert run["stages"][0]["transfer"] is None
    assert run["stages"][1]["transfer"]["distill"]["alpha"] == 2.0
    idle, first = run["stages"][1]["gap_s"], run["stages"][1]["first_step_s"]
    logged = [next(x["time"] for x in lines(out)[::way] if x["stage"] == index) for index, way in ((0, -1), (1, 1))]
    assert 0 < idle < 60
    assert 0 < first < idle + first < logged[1] - logged[0] + 0.1
    assert run["totals"]["speedup"] == pytest.approx(run["totals"]["baseline_macs"] / run["totals"]["macs"], rel=1e-3)
    assert [(x["stage"], x["step"]) for x in lines(out)] == [(0, s) for s in range(4, 25, 4)] + [
        (1, s) for s in range(4, 17, 4)
    ]
    distilled = [x for x in lines(out) if x["stage"] == 1]
    assert all(0 < x["distill_loss"] < x["task_loss"] for x in distilled)
    assert all(x["distill_loss"] == 0 for x in lines(out) if x["stage"] == 0)
    trace = json.loads((out / "trace.json").read_text())
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"CoM-micro-S", "CoM-micro-M", "evaluate CoM-micro-S", "build CoM-micro-M"} <= names
    assert not (out / "checkpoints").exists() or not list((out / "checkpoints").rglob("*.safetensors"))
    assert {p.name for p in out.iterdir() if p.is_dir()} <= {"stages", "tensorboard", "checkpoints", ".driver"}
    assert "✓</i> succeeded" in (out / "report.html").read_text()
    assert [(e["stage"], e["step"]) for e in run["evaluations"]] == [(0, 8), (0, 16), (0, 24), (1, 0), (1, 8), (1, 16)]


def test_open_clip_alone_gives_the_metrics_of_the_run(finished, demo, tmp_path):
    run, out, _ = finished
    for stage in run["stages"]:
        name = f"local-dir:{out / stage['checkpoint']}"
        model, _, preprocess = open_clip.create_model_and_transforms(name)
        tokenizer = open_clip.get_tokenizer(name)
        model.eval()
        assert "raychain" not in json.loads((out / stage["checkpoint"] / "open_clip_config.json").read_text())
        folder = demo / "zero_shot" / "test"
        classes = (folder / "classnames.txt").read_text().splitlines()
        templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
        with torch.no_grad():
            prompts = [[t.replace("{c}", c) for t in templates] for c in classes]
            weights = torch.stack([model.encode_text(tokenizer(p), normalize=True).mean(0) for p in prompts])
            images, labels = [], []
            wanted = members.Wanted(label=True)
            for shard in survey(expand([str(folder / "test")], "test"), wanted, tmp_path, "test"):
                for sample in read(shard, wanted):
                    images.append(preprocess(_open(members.picture(sample))))
                    labels.append(int(sample["cls"]))
            features = model.encode_image(torch.stack(images), normalize=True)
            top1 = ((features @ weights.T).argmax(1) == torch.tensor(labels)).float().mean() * 100
        assert stage["metrics"]["zero_shot_top1"] == pytest.approx(float(top1), abs=0.2)


def _open(encoded: bytes):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(encoded))


def test_the_same_command_again_reuses_every_stage_without_ray(finished, monkeypatch):
    _, out, tree = finished
    before = (out / "stages/0-CoM-micro-S/open_clip_model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(driver, "_execute", None)
    run = raychain.run(validate(tree))
    assert run["status"] == "succeeded"
    assert [s["status"] for s in run["stages"]] == ["reused", "reused"]
    assert (out / "stages/0-CoM-micro-S/open_clip_model.safetensors").stat().st_mtime_ns == before


def test_a_changed_last_stage_keeps_the_first_measures_it_as_asked_and_sets_the_old_one_aside(finished):
    first, out, tree = finished
    tree["chain"][1]["epochs"] = "8 steps"
    del tree["evaluate"]["zero_shot"]
    run = raychain.run(validate(tree))
    assert run["stages"][0]["metrics"] == {k: v for k, v in first["stages"][0]["metrics"].items() if "zero" not in k}
    assert [s["status"] for s in run["stages"]] == ["reused", "trained"]
    old = first["stages"][1]["key"][:8]
    assert (out / f"stages/1-CoM-micro-M.{old}/open_clip_model.safetensors").is_file()


def test_an_interrupted_run_continues_to_the_same_result(ray_session, tree, tmp_path):
    tree["chain"] = [{"model": "CoM-micro-S", "epochs": "120 steps"}]
    tree["evaluate"] = {}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    out = tmp_path / "cut"
    command = [sys.executable, "-m", "raychain.run", str(file), "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    saved = [p.name for p in (out / "checkpoints/0-CoM-micro-S").iterdir()]
    assert saved
    resumed = raychain.run(validate(tree), out=str(out))
    whole = raychain.run(validate(tree | {"storage": str(tmp_path / "apart")}), out=str(tmp_path / "whole"))
    assert resumed["stages"][0]["key"] == whole["stages"][0]["key"]
    assert [x["step"] for x in lines(out)] == [x["step"] for x in lines(tmp_path / "whole")]
    for a, b in zip(lines(out), lines(tmp_path / "whole"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.long
def test_a_longer_wsd_stage_goes_on_from_the_shorter_ones_trunk_to_the_same_result(ray_session, tree, tmp_path, capsys):
    tree["chain"] = [{"model": "CoM-micro-S", "epochs": "20 steps"}]
    tree["train"] |= {"schedule": "wsd", "cooldown": "25 %", "average": "3 steps", "warmup": "4 steps"}
    short = raychain.run(validate(tree))
    trunks = list((tmp_path / "runs/store/.trunks").glob("*/*/state.json"))
    assert [path.parent.name for path in trunks] == ["0000000015"]
    tree["chain"][0]["epochs"] = "40 steps"
    longer = raychain.run(validate(tree))
    assert "resumed at step 15" in capsys.readouterr().err
    apart = raychain.run(validate(tree | {"storage": str(tmp_path / "apart")}))
    assert apart["stages"][0]["key"] == longer["stages"][0]["key"] != short["stages"][0]["key"]
    assert apart["stages"][0]["metrics"] == longer["stages"][0]["metrics"]
    names = ("runs/tiny/stages/0-CoM-micro-S", "apart/tiny/stages/0-CoM-micro-S")
    ours, theirs = (load_file(tmp_path / name / "open_clip_model.safetensors") for name in names)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


@pytest.mark.long
def test_a_diverging_run_fails_naming_the_step_and_keeps_the_first_stage(ray_session, tree, tmp_path):
    tree["chain"][1] |= {"lr": 1e30}
    tree["train"]["clip_norm"] = None
    tree["compute"]["max_failures"] = 0
    with pytest.raises(RunFailed, match="not finite at step"):
        raychain.run(validate(tree))
    run = json.loads((tmp_path / "runs/tiny/run.json").read_text())
    assert run["status"] == "failed"
    assert run["stages"][0]["status"] == "trained"
    tree["chain"][1]["lr"] = 1e-3
    assert [s["status"] for s in raychain.run(validate(tree))["stages"]] == ["reused", "trained"]


@contextlib.contextmanager
def workers_rest(wanted: Callable[[], bool]) -> Iterator[None]:
    """Workers mostly stand still while `wanted`: a preloader runs on cores that no other wants, and beside other tests
    it would get none before a short stage's end.
    """
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.05):
            if wanted():
                workers = [x for x in psutil.Process().children(recursive=True) if "RayTrainWorker" in x.name()]
                for worker in workers:
                    worker.suspend()
                over.wait(1)
                for worker in workers:
                    worker.resume()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_stage_of_its_own_source_and_resolution_is_preloaded_while_the_one_before_trains(
    ray_session, tree, demo, tmp_path
):
    tree["chain"] = [
        {"model": "CoM-micro-S", "epochs": "400 steps"},
        {
            "model": "CoM-micro-M",
            "epochs": "12 steps",
            "data": {"train": str(demo / "validation"), "image_size": 48, "captions": {"per_image": 1}},
        },
    ]
    tree["train"]["global_batch"] = 16
    tree["preload"] = {"cache": str(tmp_path / "cache")}
    tree["evaluate"] = {}
    out = tmp_path / "runs" / "tiny"
    sources = [Path(tree["data"]["train"]), demo / "validation"]
    shards = sum(len(list(source.glob("*.tar"))) for source in sources)
    with workers_rest(
        lambda: (out / "metrics.jsonl").exists() and len(list((tmp_path / "cache").rglob("*.arrow"))) < shards
    ):
        run = raychain.run(validate(tree))
    config = json.loads((out / run["stages"][1]["checkpoint"] / "open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["image_size"] == 48
    bars = json.loads((out / "trace.json").read_text())["traceEvents"]
    first = {
        bar["name"]: bar for bar in bars if bar.get("ph") == "X" and bar["name"] in ("CoM-micro-S", "build CoM-micro-M")
    }
    preloads = [bar for bar in bars if bar.get("cat") == "preload" and bar["args"]["stage"] == 1]
    assert len(preloads) == len(list((demo / "validation").glob("*.tar")))
    end = first["CoM-micro-S"]["ts"] + first["CoM-micro-S"]["dur"]
    assert all(bar["ts"] + bar["dur"] < end for bar in [*preloads, first["build CoM-micro-M"]])


def test_a_chain_across_architectures_distils_and_grows_the_text_tower_alone(ray_session, tree, tmp_path):
    tree["chain"] = [{"model": "CoM-micro-S", "epochs": "8 steps"}, {"model": "CoM-micro-Swin", "epochs": "8 steps"}]
    tree["evaluate"] = {}
    run = raychain.run(validate(tree))
    out = tmp_path / "runs" / "tiny"
    assert all(0 < x["distill_loss"] < x["task_loss"] for x in lines(out) if x["stage"] == 1)
    small, large = (load_file(out / stage["checkpoint"] / "open_clip_model.safetensors") for stage in run["stages"])
    words, grown = (state["token_embedding.weight"] for state in (small, large))
    assert torch.cosine_similarity(words, grown[:, :64]).mean() > 0.99
    model = open_clip.create_model(f"local-dir:{out / run['stages'][1]['checkpoint']}")
    assert model.encode_image(torch.zeros(2, 3, 40, 40)).shape == (2, 64)


def test_a_stage_that_another_driver_finishes_after_planning_counts_as_reused(finished, tmp_path, monkeypatch):
    run, out, tree = finished
    meanwhile = out.rename(tmp_path / "meanwhile")
    task = make_task(validate(tree), str(out))
    meanwhile.rename(out)
    assert [stage.status for stage in task.stages] == ["trained", "trained"]
    seen = []
    monkeypatch.setattr(driver, "_run", lambda task, *_: seen.append(task) or run)
    monkeypatch.setattr(driver, "leave_report", lambda _: None)
    monkeypatch.setattr(driver, "leave_cards", lambda _: None)
    driver.run_chain(task)
    assert [stage.status for stage in seen[0].stages] == ["reused", "reused"]
