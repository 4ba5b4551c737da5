"""A chain of classifiers on Ray: it trains, goes on, survives, is searched, grown, measured and reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from class_shards import CLASSES, class_shards
from test_packages import losses, run
from test_world_size import _train, curve
from yaml import safe_dump

import raychain
from raychain.api.grow import grow_checkpoint
from raychain.config.loading import validate
from raychain.errors import InputError
from raychain.runs.resolve import make_task

CHANGED = {"smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "erase": 0.25, "augment": "rand-m9-mstd0.5-inc1"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_shards(tmp_path_factory.mktemp("data") / "places", 320, 100)


@pytest.fixture
def tree(pictures: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "places",
        "task": {"paradigm": "classify", "classes": CLASSES, "flip": 0.0, "drop_path": {"CoM-micro-DeiT-S": 0.1}},
        "data": {"train": str(pictures / "train"), "crop": [0.8, 1.0]},
        "chain": [
            {"model": "CoM-micro-DeiT-XS", "epochs": "100 steps"},
            {"model": "CoM-micro-DeiT-S", "epochs": "40 steps"},
        ],
        "train": {"global_batch": 32, "warmup": "10 %", "log_every": 4, "lr": 3.0e-3},
        "transfer": {"distill": {"alpha": 1.0}},
        "compute": {"workers": 1, "cpus_per_worker": 1},
        "checkpoint": {"every": "10 steps"},
        "preload": {"cache": str(tmp_path / "cache")},
        "evaluate": {"held-out": {"type": "accuracy", "data": str(pictures)}},
        "storage": str(tmp_path / "runs"),
    }


@pytest.mark.slow
def test_a_chain_of_classifiers_trains_is_measured_grows_and_reports(
    ray_session: None, tree: dict[str, Any], pictures: Path, tmp_path: Path
) -> None:
    planned = raychain.plan(validate(tree))
    assert planned["warnings"] == [], "the principles are not known to hold for classifiers"
    found = raychain.run(validate(tree))
    out = Path(tree["storage"]) / "places"
    assert found["score"] == "held-out/top1"
    accuracy = [stage["metrics"]["held-out/top1"] for stage in found["stages"]]
    assert min(accuracy) > 40, "the squares are found by chance in 20 %"
    assert found["stages"][1]["gap_s"] < 2, "seconds; the suite runs other tests beside"
    assert found["stages"][0]["macs"] == planned["stages"][0]["macs"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    grown = [line for line in lines if line["stage"] == 1]
    assert grown[0]["task_loss"] < 0.8 * lines[0]["task_loss"], "the larger model starts as the smaller one"
    assert all(0 <= line["distill_loss"] < line["task_loss"] for line in grown)
    folder = out / "stages" / "1-CoM-micro-DeiT-S"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert (model.num_classes, model.embed_dim) == (CLASSES, 48)
    measured = raychain.evaluate(str(folder), evaluators=tree["evaluate"], cache=str(tmp_path / "cache"), device="cpu")
    assert measured["metrics"]["held-out/top1"] == pytest.approx(accuracy[1], abs=1e-9)
    wider = grow_checkpoint(folder, "CoM-micro-DeiT-M", tmp_path / "wider")
    assert wider.drift["classifier"].relative_error < 1e-4
    assert timm.create_model(f"local-dir:{tmp_path / 'wider'}", pretrained=True).embed_dim == 80
    page = Path(raychain.report(str(out))).read_text()
    assert "held-out top-1" in page
    assert "image tower" not in page
    again = raychain.run(validate(tree))
    assert [stage["status"] for stage in again["stages"]] == ["reused", "reused"]


@pytest.mark.long
def test_losses_do_not_depend_on_the_number_of_workers_or_its_changes(tree: dict[str, Any], tmp_path: Path) -> None:
    """With mixing, changes, drop path and micro-batches: relative deviation at most 1e-4."""
    tree |= {"evaluate": {}, "checkpoint": {"every": "1000 steps"}}
    tree["task"] |= CHANGED
    tree["train"] |= {"global_batch": 12, "log_every": 1, "micro_batch": 3}
    tree["chain"][0]["epochs"], tree["chain"][1]["epochs"] = "20 steps", "80 steps"
    plans = {"1": [(1, None)], "2→1→2": [(2, 30), (1, 55), (2, None)]}
    curves = {}
    for name, plan in plans.items():
        out = tmp_path / name
        task = make_task(validate(tree), str(out))
        out.mkdir(exist_ok=True)
        for number, (world, leave) in enumerate(plan):
            rendezvous = str(out / f"rendezvous-{number}")
            torch.multiprocessing.spawn(_train, args=(world, rendezvous, task, leave), nprocs=world)
        curves[name] = curve(out)
    assert len(curves["1"]) == 100
    assert curves["2→1→2"] == pytest.approx(curves["1"], rel=1e-4)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_worker_costs_nothing_but_time(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["task"] |= CHANGED
    tree["compute"]["workers"] = 2
    tree["chain"][0]["epochs"], tree["chain"][1]["epochs"] = "40 steps", "200 steps"
    for name in ("whole", "killed"):  # each with a storage of its own, so that they share no stages
        (tmp_path / f"{name}.yaml").write_text(safe_dump(tree | {"storage": str(tmp_path / f"runs-{name}")}))
    whole = run(tmp_path, tmp_path / "whole.yaml", tmp_path / "whole")
    killed = run(tmp_path, tmp_path / "killed.yaml", tmp_path / "killed", kill_at=60)
    assert killed["restarts"]
    assert [stage["key"] for stage in killed["stages"]] == [stage["key"] for stage in whole["stages"]]
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert whole["stages"][1]["gap_s"] < 0.5


@pytest.mark.long
def test_a_search_finds_chains_of_classifiers(ray_session: None, tree: dict[str, Any]) -> None:
    del tree["chain"]
    tree["family"] = ["CoM-micro-DeiT-{XS,S}"]
    space = {"first": ["20 steps"], "grown": ["10 steps", "20 steps"], "alpha": [1.0]}
    tree["search"] = {"trials": 2, "seeds": 1, "space": space, "controls": {"equal_macs": True}, "sampler": "grid"}
    result = raychain.search(validate(tree)).record
    assert len(result["trials"]) >= 4
    assert result["metric"] == "held-out/top1"
    with pytest.raises(InputError, match=r"allocation.first and allocation.rules"):
        raychain.plan(validate({k: v for k, v in tree.items() if k != "search"}))
    tree["allocation"] = {"first": 4, "rules": [[2, 1]]}
    proposed = raychain.plan(validate({k: v for k, v in tree.items() if k != "search"}))
    assert proposed["why"][0].startswith("cost")
