"""Models that are measured beside the training, wherever that is, and what happens when it is lost."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

import raychain
from raychain.backend_ray import group as ray_train
from raychain.backend_ray import measuring
from raychain.backend_ray.worker import train_chain
from raychain.config.loading import validate
from raychain.training.stage import ChainWorker

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _workers_know_this_module():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class LostApart(measuring.Apart):
    """Its process dies when it is asked."""

    def measure(self, *_: Any) -> dict[str, float]:
        os._exit(1)


def by_the_group(config: dict[str, Any]) -> bool:
    """A worker that measures together with the others, while training waits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChainWorker, "measures_beside", property(lambda _: False, lambda *_: None), raising=False)
        return train_chain(config)


def apart(config: dict[str, Any]) -> bool:
    """A worker that measures with resources of their own, however few pictures there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "APART_FROM", 1)
        return train_chain(config)


def apart_and_lost(config: dict[str, Any]) -> bool:
    """The same, and the process that measures dies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "Apart", LostApart)
        return apart(config)


def measurements(run: dict[str, Any]) -> dict[tuple[int, int], dict[str, float]]:
    return {(found["stage"], found["step"]): found["metrics"] for found in run["evaluations"]}


@pytest.mark.parametrize(
    "worker",
    [
        by_the_group,
        pytest.param(apart, marks=pytest.mark.long),
        pytest.param(apart_and_lost, marks=pytest.mark.long),
    ],
)
def test_metrics_are_the_same_wherever_models_are_measured(
    ray_session: None, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, worker: Any
) -> None:
    """`finished` is measured in a thread of a worker."""
    usual, _, tree = finished
    monkeypatch.setattr(ray_train, "train_chain", worker)
    run = raychain.run(validate(tree | {"storage": str(tmp_path / "other")}))
    assert [stage["status"] for stage in run["stages"]] == ["trained", "trained"]
    assert [stage["metrics"] for stage in run["stages"]] == [stage["metrics"] for stage in usual["stages"]]
    assert not run["restarts"]
    lost = worker is apart_and_lost
    assert ("will be measured again" in capsys.readouterr().err) == lost
    found, expected = measurements(run), measurements(usual)
    assert all(expected[place] == metrics for place, metrics in found.items())
    assert {(0, 24), (1, 16)} <= found.keys() if lost else found.keys() == expected.keys()
    stored = json.loads((tmp_path / "other/tiny/stages/0-CoM-micro-S/stage.json").read_text())
    assert stored["metrics"] == usual["stages"][0]["metrics"]
    assert stored["evaluation"]


def test_the_next_stage_does_not_wait_for_the_measurement_of_the_last_one(finished: Any) -> None:
    run, out, _ = finished
    bars = json.loads((out / "trace.json").read_text())["traceEvents"]
    found = {bar["name"]: bar for bar in bars if bar.get("ph") == "X"}
    last = max(bar["ts"] + bar["dur"] for bar in bars if bar.get("name") == "evaluate CoM-micro-S")
    assert found["CoM-micro-M"]["ts"] < last
    assert [(e["stage"], e["step"]) for e in run["evaluations"]] == sorted(
        (e["stage"], e["step"]) for e in run["evaluations"]
    )
