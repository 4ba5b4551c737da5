"""A stage that is measured beside the training of the next one, and what happens when that is lost."""

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
from raychain.backend_ray.worker import train_chain
from raychain.config.loading import validate
from raychain.training import measuring

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _workers_know_this_module():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def with_few_pictures(config: dict[str, Any]) -> bool:
    """A worker that measures apart however few pictures there are."""
    measuring.APART_FROM = 1
    return train_chain(config)


def with_a_lost_process(config: dict[str, Any]) -> bool:
    """The same, and the process that measures dies."""
    measuring._measure = dying
    return with_few_pictures(config)


def dying(*_: Any) -> None:
    os._exit(1)


@pytest.mark.parametrize("worker", [with_few_pictures, pytest.param(with_a_lost_process, marks=pytest.mark.long)])
def test_a_stage_measured_apart_has_the_same_metrics_and_the_next_does_not_wait(
    ray_session: None, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, worker: Any
) -> None:
    usual, _, tree = finished
    monkeypatch.setattr(ray_train, "train_chain", worker)
    tree["evaluate"].pop("every")
    run = raychain.run(validate(tree | {"storage": str(tmp_path / "apart")}))
    assert [stage["status"] for stage in run["stages"]] == ["trained", "trained"]
    assert [stage["metrics"] for stage in run["stages"]] == [stage["metrics"] for stage in usual["stages"]]
    assert not run["restarts"]
    assert ("CoM-micro-S will be measured again" in capsys.readouterr().err) == (worker is with_a_lost_process)
    bars = json.loads((tmp_path / "apart/tiny/trace.json").read_text())["traceEvents"]
    ends = {bar["name"]: bar["ts"] + bar["dur"] for bar in bars if bar.get("ph") == "X"}
    begins = {bar["name"]: bar["ts"] for bar in bars if bar.get("ph") == "X"}
    assert begins["CoM-micro-M"] < ends["evaluate CoM-micro-S"]
    stored = json.loads((tmp_path / "apart/tiny/stages/0-CoM-micro-S/stage.json").read_text())
    assert stored["metrics"] == usual["stages"][0]["metrics"]
    assert stored["evaluation"]
