"""Identities that must not change by accident: keys of stages, names of cached files, and the losses of a small run.

What is expected stands in `tests/golden/`. A change there is a change of identity: finished stages are trained again,
so it is deliberate, versioned and in the changelog. `python tests/test_golden.py` writes the files anew.
"""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from raychain.config import load_experiment
from raychain.config.loading import validate
from raychain.runs.resolve import make_task, replan
from raychain.searching.request import plan_search

GOLDEN = Path(__file__).parent / "golden"
CAPTIONS = {"keys": ["txt", "json.captions"], "per_image": 2}
PAPER = ("cc3m-vit-tsbl", "cc3m-swin-tsbl", "merged15m-vit-smbl", "cc3m-vit-family7")


def write_shards(folder: Path, shards: int = 4, samples: int = 600, first: int = 0) -> None:
    """Shards whose bytes depend on the arguments alone; only their names are read, so the pictures are none."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(samples):
                number = first + shard * samples + i
                content = {"jpg": bytes([number % 251]) * 300, "txt": f"caption {number}".encode(),
                           "json": b'{"captions": ["one", "two"]}'}  # fmt: skip
                for extension, data in content.items():
                    info = tarfile.TarInfo(f"{number:06d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def experiments(root: Path) -> dict[str, dict[str, Any]]:
    """Experiments of different kinds on the shards in `root`, as a user would write them."""
    base: dict[str, Any] = {
        "name": "golden",
        "data": {"train": str(root / "a"), "captions": CAPTIONS},
        "chain": [{"model": "CoM-micro-S", "epochs": 8}, {"model": "CoM-micro-M", "epochs": 3},
                  {"model": "CoM-micro-L", "epochs": 1}],
        "train": {"global_batch": 64, "warmup": "10 %"},
        "compute": {"cpus_per_worker": 1},
        "preload": {"cache": str(root / "cache")},
        "storage": str(root / "runs"),
    }  # fmt: skip

    def varied(**changes: dict[str, Any] | list[Any]) -> dict[str, Any]:
        return base | {k: base.get(k, {}) | v if isinstance(v, dict) else v for k, v in changes.items()}

    two = base["chain"][:2]
    mixture = [str(root / "a"), {"shards": str(root / "b" / "*.tar"), "weight": 2}]
    return {
        "plain": base,
        "wsd": varied(train={"schedule": "wsd", "cooldown": "25 %"}),
        "crops": varied(data={"crop": [0.9, 1.0], "shuffle_window": 2, "captions": CAPTIONS | {"per_image": 4}}),
        "mixture": varied(data={"train": mixture, "samples": 3000}),
        "lanes": varied(data={"train": mixture, "lanes": 4}),
        "own-data": varied(chain=[two[0], two[1] | {"data": {"train": str(root / "b"), "image_size": 48}}]),
        "recipe": varied(
            train={"lr": 5e-4, "betas": [0.9, 0.95], "eps": 1e-7, "average": None, "clip_norm": None, "seed": 7,
                   "schedule": "constant", "precision": "bf16", "weight_decay": 0.2},
            transfer={"width": "duplicate", "depth": "stack", "distill": {"alpha": 1.0, "cap": False}},
        ),
        "shrink": varied(transfer={"shrink": 0.2, "warmup": "4 steps", "lr_scale": 0.5, "distill": None}),
        "moments": varied(transfer={"optimizer": "grow"}, chain=[two[0], two[1] | {"lr": 2e-4, "warmup": "5 steps"}]),
        "swin": varied(chain=[two[1], {"model": "CoM-micro-Swin", "epochs": "100 steps"}]),
        "vit": varied(chain=[{"model": "CoM-ViT-T-16", "epochs": 2}, {"model": "CoM-ViT-S-16", "epochs": 1}]),
        "open_clip": varied(chain=[{"model": "ViT-B-32", "epochs": 2}]),
        "elastic": varied(compute={"workers": [1, 4]}, evaluate={"every": "20 steps"}, checkpoint={"every": "9 steps"}),
    }  # fmt: skip


def identities(root: Path) -> dict[str, list[dict[str, Any]]]:
    """What identifies the stages of every experiment, and those of the shipped chains and of a search."""
    found = {}
    for name, tree in experiments(root).items():
        found[name] = [_identity(stage) for stage in make_task(validate(tree), str(root / "out")).stages]
    for name in PAPER:
        overrides = [
            f"data.train={root}/a",
            "data.samples=",
            f"preload.cache={root}/cache",
            "evaluate={}",
            "transfer.warmup=1 steps",
        ]
        overrides += [
            "data.captions.keys=[txt]",
            "train.global_batch=64",
            "train.warmup=1 steps",
            "train.precision=bf16",
        ]
        experiment = load_experiment(name, [*overrides, "compute.gpus_per_worker=0"])
        chain = tuple(stage.model_copy(update={"warmup": None}) for stage in experiment.chain)
        experiment = experiment.model_copy(update={"chain": chain})
        found[name] = [_identity(stage) for stage in make_task(experiment, str(root / "out")).stages]
    for schedule in ("cosine", "wsd"):
        found[f"search-{schedule}"] = _search(root, schedule)
    return found


def _identity(stage: Any) -> dict[str, Any]:
    feed = stage.feed
    cached = [f"{shard.identity}-{feed.reader.digest}" for shard in feed.shards]
    shown = ("model", "key", "trunk", "rungs", "steps")
    # what schema 2 called the same: stages that it finished are found by that key
    former = {"key": stage.former.key, "cached": [f"{shard.former}-{feed.reader.digest}" for shard in feed.shards][:1]}
    own = {"rungs": list(stage.rungs), "cached": cached[:1], "former": former}
    return {name: getattr(stage, name) for name in shown} | own


def _search(root: Path, schedule: str) -> list[dict[str, Any]]:
    tree = experiments(root)["plain"] | {"evaluate": {"retrieval": str(root / "a")}}
    tree["train"] = tree["train"] | {"schedule": schedule}
    space = {"models": "CoM-micro-{S,M,L}", "first": [4, 8], "grown": [1, 2], "alpha": [0, 2]}
    tree["search"] = {"space": space, "metric": "i2t_r1"}
    plan = plan_search(validate(tree), str(root / "out"), str(root / "runs"))
    others = plan.space.others(1.0)
    chains = itertools.islice(plan.space.points(), 0, None, 7)
    tasks = [replan(plan.base, plan.space.chosen(params), str(root / "out"), others) for params in chains]
    return [_identity(stage) for task in tasks for stage in task.stages]


def test_keys_of_stages_and_names_of_cached_files_are_what_they_were(tmp_path: Path) -> None:
    write_shards(tmp_path / "a")
    write_shards(tmp_path / "b", shards=2, first=10_000)
    expected = json.loads((GOLDEN / "keys.json").read_text())
    found = identities(tmp_path)
    assert found.keys() == expected.keys()
    for name, stages in expected.items():
        assert found[name] == stages, name


def losses(out: Path) -> list[list[float]]:
    """[stage, step, task loss, distillation loss] of every logged step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[x["stage"], x["step"], x["task_loss"], x["distill_loss"]] for x in lines]


@pytest.mark.slow
def test_losses_of_a_small_chain_are_what_they_were(finished: Any) -> None:
    """Rounding differs between processors, so a little is allowed; another order of samples or draw is far more."""
    _, out, _ = finished
    expected = json.loads((GOLDEN / "losses.json").read_text())
    found = losses(out)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row[2:] == pytest.approx(wanted[2:], abs=2e-3), row


def test_metrics_of_a_small_chain_are_what_they_were(finished: Any) -> None:
    """One picture of the zero-shot test or of the retrieval test may fall the other way on another processor."""
    run, _, _ = finished
    expected = json.loads((GOLDEN / "metrics.json").read_text())
    for stage, wanted in zip(run["stages"], expected, strict=True):
        assert {name: stage["metrics"][name] for name in wanted} == pytest.approx(wanted, abs=2.5)


@pytest.mark.long
def test_the_demo_in_a_minute_learns_what_it_learned(tmp_path: Path) -> None:
    """`demo-quick` on rendered pictures, two workers."""
    import raychain

    overrides = [f"data.demo.out={tmp_path}/demo", f"data.train={tmp_path}/demo/train", f"storage={tmp_path}/runs"]
    overrides += [f"evaluate.zero_shot={tmp_path}/demo/zero_shot/test", f"evaluate.retrieval={tmp_path}/demo/test"]
    run = raychain.run("demo-quick", overrides=(*overrides, f"preload.cache={tmp_path}/cache"))
    expected = json.loads((GOLDEN / "demo-quick.json").read_text())
    for stage, wanted in zip(run["stages"], expected["metrics"], strict=True):
        assert {name: stage["metrics"][name] for name in wanted} == pytest.approx(wanted, abs=1.0)
    for row, wanted in zip(losses(tmp_path / "runs" / "demo-quick"), expected["losses"], strict=True):
        assert row == pytest.approx(wanted, abs=5e-3)


if __name__ == "__main__":
    import sys

    where = Path(sys.argv[1])
    write_shards(where / "a")
    write_shards(where / "b", shards=2, first=10_000)
    (GOLDEN / "keys.json").write_text(json.dumps(identities(where), indent=1) + "\n")
