"""Searchers, schedulers and stoppers of Ray Tune on chains that are trained; a search whose node is lost; trackers."""

# ruff: noqa: F811 - fixtures of another module
from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from faults import Site, experiment
from test_search import Instant, halved, instant, small  # noqa: F401 - fixtures
from test_tune import METRIC, PACKAGE, six  # noqa: F401 - fixtures

import raychain
from raychain.config.loading import validate

pytestmark = pytest.mark.long
SPACE = {"models": "CoM-micro-{S,M}", "first": ["8 steps", "12 steps"], "grown": ["4 steps", "6 steps"]}
FLOOR = {"name": "raychain_tuning.Floor", "metric": METRIC, "least": 0.0}


@pytest.mark.parametrize(
    "parts",
    [
        {"sampler": "tpe", "scheduler": "asha"},
        {"sampler": "random", "scheduler": {"name": "median", "grace_period": 1, "min_samples_required": 1}},
        {"sampler": "grid", "scheduler": FLOOR},
        {"sampler": {"name": "hyperopt", "n_initial_points": 2}, "scheduler": {"name": "hyperband", "max_t": 100}},
        {"sampler": "bohb", "scheduler": {"name": "bohb", "max_t": 100}},
        {"sampler": "raychain_tuning.Climb", "stop": {"name": "maximum_iterations", "max_iter": 3}},
    ],
    ids=lambda parts: "-".join(str(p["name"] if isinstance(p, dict) else p).rpartition(".")[2] for p in parts.values()),
)
def test_parts_of_tune_on_chains_that_are_trained(
    ray_session: None, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, parts: dict[str, Any]
) -> None:
    if parts["sampler"] == "bohb":
        pytest.importorskip("hpbandster")
        pytest.importorskip("ConfigSpace")
    monkeypatch.syspath_prepend(str(PACKAGE))
    small["evaluate"]["every"] = "4 steps"
    small["search"] |= {"space": SPACE, "trials": 4, "seeds": 0, "controls": None, **parts}
    found = raychain.search(validate(small))
    trials = found.record["trials"]
    assert found.record["status"] == "succeeded"
    assert len(found.results) == len(trials)
    assert {trial["status"] for trial in trials} <= {"succeeded", "stopped"}
    if "stop" in parts:
        assert {trial["status"] for trial in trials} == {"succeeded", "stopped"}, "three reports are enough for some"
    assert found.best["status"] == "succeeded"
    folder = Path(small["storage"]) / "tiny-search"
    runs = [json.loads(path.read_text())["stages"] for path in folder.glob("chains/*/run.json")]
    trained = [stage["key"] for stages in runs for stage in stages if stage["status"] == "trained"]
    assert len(trained) == len(set(trained)), "each stage once"
    stored = [json.loads(path.read_text())["key"] for path in Path(small["storage"]).glob("store/*/stage.json")]
    assert sorted(stored) == sorted(found.record["trained"])
    assert set(trained) <= set(stored), "a chain that was let wait and goes on calls its own stages reused"
    again = raychain.search(validate(small)).record
    assert [t["params"] for t in again["trials"][: len(trials)]] == [t["params"] for t in trials]
    ends = {(before["status"], now["status"]) for before, now in zip(trials, again["trials"], strict=False)}
    goes_on = {("stopped", "succeeded")} if parts["sampler"] == "bohb" else set()  # Tune has saved that they wait
    assert ends <= {("succeeded", "succeeded"), ("stopped", "stopped")} | goes_on
    assert {trial.get("reason") for trial in again["trials"] if trial["status"] == "succeeded"} == {None}


def test_a_time_budget_ends_a_search_with_what_it_has(ray_session: None, small: dict[str, Any]) -> None:
    space = SPACE | {"grown": {"low": 0.1, "high": 2.0, "step": 0.02}}
    stop = {"name": "timeout", "timeout": 90}
    small["search"] |= {"space": space, "trials": 60, "seeds": 0, "controls": None, "sampler": "random", "stop": stop}
    began = time.monotonic()
    found = raychain.search(validate(small)).record
    assert time.monotonic() - began < 180
    ends = [trial["status"] for trial in found["trials"]]
    assert 1 <= ends.count("succeeded") < 60
    assert set(ends) <= {"succeeded", "stopped"}


def test_a_search_whose_node_is_lost_ends_with_the_result_of_an_undisturbed_one(demo: Path, tmp_path: Path) -> None:
    """Two nodes of a worker group each; one is killed while both train, and another comes later."""
    space = {"models": "CoM-micro-{S,M}", "first": ["150 steps", "200 steps"], "grown": ["40 steps", "60 steps"]}
    tree = experiment(demo, tmp_path / "runs", tmp_path / "cache")
    del tree["chain"]
    tree |= {
        "family": "CoM-micro-{S,M}",
        "evaluate": {"zero_shot": str(demo / "zero_shot" / "test")},
        "compute": {"workers": 1, "cpus_per_worker": 1, "max_failures": 3},
        "search": {"trials": 4, "seeds": 0, "sampler": "grid", "controls": None, "space": space},
    }
    with Site(tree, tmp_path) as site:

        def search(storage: str, *, lost: bool) -> dict[str, Any]:
            site.start("--set", f"storage={tmp_path / storage}", program="raychain.search")
            if lost:
                chains = tmp_path / storage / "chain-search" / "chains"
                assert site.wait(lambda: len(list(chains.glob("*/checkpoints"))) == 2, 120), site.log.read_text()
                site.cluster.remove_node(site.nodes.pop(), allow_graceful=False)
                time.sleep(8)
                site.add_node()
            site.wait(lambda: False, 300)
            assert site.driver is not None
            assert site.driver.returncode == 0, site.log.read_text()
            found: dict[str, Any] = json.loads((tmp_path / storage / "chain-search" / "search.json").read_text())
            return found

        disturbed, whole = search("lost", lost=True), search("whole", lost=False)
        restarts = [json.loads(path.read_text())["restarts"] for path in tmp_path.glob("lost/*/chains/*/run.json")]
    assert any(restarts), "a worker group was lost"
    kept = ("params", "keys", "status", "metrics", "macs")
    assert [{k: t[k] for k in kept} for t in sorted(disturbed["trials"], key=lambda t: str(t["params"]))] == [
        {k: t[k] for k in kept} for t in sorted(whole["trials"], key=lambda t: str(t["params"]))
    ]
    assert disturbed["best"]["keys"] == whole["best"]["keys"]
    assert disturbed["trained"] == whole["trained"]


def test_trackers_of_tunes_hear_of_chains(six: dict[str, Any], instant: type[Instant], tmp_path: Path) -> None:
    """MLflow's, into a database of its own, and W&B's without a network."""
    database = f"sqlite:///{tmp_path}/mlflow.db"
    callbacks = [
        {"name": "mlflow", "tracking_uri": database, "experiment_name": "chains"},
        {"name": "wandb", "project": "chains", "dir": str(tmp_path)},
    ]
    six["search"] |= {"trials": 2, "callbacks": callbacks}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_API_KEY", "0" * 40)
        record = raychain.search(validate(six)).record
    assert [trial["status"] for trial in record["trials"]] == ["succeeded"] * 2

    from mlflow import MlflowClient

    client = MlflowClient(database)
    (kept,) = client.search_experiments(filter_string="name = 'chains'")
    runs = client.search_runs([kept.experiment_id])
    assert sorted(run.data.metrics[METRIC] for run in runs) == sorted(t["metrics"][METRIC] for t in record["trials"])
    written = {path.parent.name.rpartition("-")[2] for path in tmp_path.glob("wandb/*run-*/*.wandb")}
    assert len(written) == len(runs) == 2
