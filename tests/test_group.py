"""What worker groups do when memory, resources or workers are missing. Faults of a whole cluster: test_faults.py."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import ray
import torch

import raychain
from raychain.backend_ray import cluster
from raychain.backend_ray import group as ray_train
from raychain.backend_ray.worker import train_chain
from raychain.config.loading import validate
from raychain.errors import RunFailed
from raychain.paradigms.clip.objective import ClipObjective
from raychain.runs import group

pytestmark = pytest.mark.slow
FITS = 10


@pytest.fixture(autouse=True)
def _workers_know_this_module():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def with_little_memory(config):
    """A worker whose memory holds the activations of FITS pairs of the second stage's model."""
    encode = ClipObjective.encode

    def limited(self, part):
        if self.projector is not None and len(part["images"]) > FITS:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")
        return encode(self, part)

    ClipObjective.encode = limited
    return train_chain(config)


@pytest.mark.long
def test_the_micro_batch_is_halved_until_the_memory_suffices(ray_session, tree, monkeypatch):
    monkeypatch.setattr(ray_train, "train_chain", with_little_memory)
    tree["compute"]["max_failures"] = 0  # finding the size is no failure
    tree["evaluate"] = {}
    run = raychain.run(validate(tree))
    assert run["status"] == "succeeded"
    assert [r["reason"] for r in run["restarts"]] == ["memory", "memory"]
    assert "trying 8" in run["restarts"][1]["message"]


def test_resources_that_the_cluster_lacks_are_named(ray_session, tree, monkeypatch):
    monkeypatch.setattr(group, "MISSING_S", 3.0)
    tree["compute"] |= {"workers": [2, 3], "cpus_per_worker": 3}
    with pytest.raises(
        RunFailed, match=r"2 workers of 3 CPU each cannot be placed: the cluster holds 1; it has 1 node"
    ):
        raychain.run(validate(tree))


def dying_at_once(config):
    """A worker that dies in its first moment, the first two times."""
    marks = Path(ray.get(config["task"]).out)
    died = len(list(marks.glob("died-*")))
    if died < 2:
        (marks / f"died-{died}").touch()
        os.kill(os.getpid(), 9)
    return train_chain(config)


@pytest.mark.long
def test_a_worker_that_dies_at_start_does_not_hang_the_next_attempt(ray_session, tree, monkeypatch):
    monkeypatch.setattr(ray_train, "train_chain", dying_at_once)
    tree["evaluate"] = {}
    tree["compute"] |= {"workers": 1, "cpus_per_worker": 3}  # what the dead worker's group holds is needed
    run = raychain.run(validate(tree))
    assert run["status"] == "succeeded"
    assert len(run["restarts"]) == 2
    until = time.monotonic() + 20
    while cluster.room({"CPU": 3}) < 1:
        assert time.monotonic() < until, "resources stay taken"
        time.sleep(0.1)


def test_a_stage_that_wants_other_workers_gets_a_group_of_its_own(ray_session, tree, tmp_path):
    tree["evaluate"] = {}
    tree["chain"][1]["workers"] = 2
    run = raychain.run(validate(tree))
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert {(line["stage"], line["world_size"]) for line in lines} == {(0, 1), (1, 2)}
    assert (run["status"], run["restarts"]) == ("succeeded", [])
