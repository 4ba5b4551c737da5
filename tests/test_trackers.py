"""Trackers get a run's curves once, go on with the run folder, never stop a run. W&B is offline, MLflow on sqlite."""

from __future__ import annotations

import json
import struct
import threading
import time

import pytest
from mlflow import MlflowClient
from test_config import MINIMAL
from wandb.proto.wandb_internal_pb2 import Record

import raychain
from raychain.config.loading import validate
from raychain.core.storage import Folder
from raychain.data.order import Order
from raychain.errors import InputError
from raychain.events import Evaluated, Step
from raychain.reporting import trackers
from raychain.reporting.trackers import Trackers, check_trackers
from raychain.runs.resolve import Reading, resolve_stages

BATCH = 1024  # the default
SCALARS = ("task_loss", "alpha", "lr", "samples_per_s", "data_wait_s", "world_size")
STEPS = (8, 200)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """One for all tests: MLflow takes seconds to make its tables."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def step(stage, index, loss=2.5):
    scalars = dict.fromkeys(SCALARS, 1.0) | {"loss": loss, "distill_loss": None, "report": {"logit_scale": 1.0}}
    return Step(stage=stage, step=index, samples=index * BATCH, epoch=1.0, **scalars)


def measured(stage, index, value):
    return Evaluated(stage=stage, step=index, metrics={"zero_shot_top1": value})


def session(out, track, *events, status="succeeded", key="k", name="tiny"):
    """One call of `raychain.run` on the folder `out`; returns the warnings."""
    warnings = []
    experiment = validate(MINIMAL | {"track": track, "name": name})
    trackers = Trackers(Folder(str(out)), experiment, key, STEPS, warnings.append)
    for item in events:
        trackers.dispatch(item)
    trackers.finish(status, {"macs": 3, "speedup": 1.5})
    return [warning.message for warning in warnings]


def mlflow_runs(database, name):
    client = MlflowClient(tracking_uri=database)
    return client, client.search_runs([client.get_experiment_by_name(name).experiment_id])


def wandb_records(out):
    """The records of each session's file, oldest first; W&B's own process may write the end after `finish` returned."""
    files = list(out.glob("wandb/offline-run-*/*.wandb"))
    deadline = time.monotonic() + 30
    while True:
        sessions = [[Record.FromString(chunk) for chunk in chunks(path.read_bytes())] for path in files]
        if all(records and records[-1].WhichOneof("record_type") == "exit" for records in sessions):
            return sorted(sessions, key=lambda records: records[1].run.start_time.ToNanoseconds())
        assert time.monotonic() < deadline, "W&B did not complete its files"
        time.sleep(0.1)


def chunks(content):
    """The records of a LevelDB log, which W&B's files are (after 7 bytes): checksum, length, kind, content."""
    at, block, parts = 7, 2**15, []
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if at + 7 + length > len(content):  # still being written
            return
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def rows(records):
    """History rows: name → value."""
    history = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in h.item} for h in history]


def test_mlflow_continues_one_run_and_logs_no_step_twice(tmp_path, database):
    first = [step(0, 4), step(0, 8), measured(0, 8, 10.0), step(1, 20), measured(1, 20, 11.0), step(1, 40)]
    again = [step(1, 40, 1.5), measured(1, 20, 99.0), step(1, 60, 1.5), measured(1, 40, 12.0)]
    assert session(tmp_path, {"mlflow": database}, *first, status="interrupted", name="continued") == []
    client, [run] = mlflow_runs(database, "continued")
    assert (run.info.status, run.data.tags["status"]) == ("KILLED", "interrupted")
    assert session(tmp_path, {"mlflow": database}, *again, name="continued") == []
    client, [run] = mlflow_runs(database, "continued")
    assert (run.info.run_name, run.info.status, run.data.tags["status"]) == (tmp_path.name, "FINISHED", "succeeded")

    def curve(name):
        return [(point.step // BATCH, point.value) for point in client.get_metric_history(run.info.run_id, name)]

    assert curve("stage0/loss") == [(4, 2.5), (8, 2.5)]
    assert curve("stage1/loss") == [(20, 2.5), (40, 2.5), (60, 1.5)]
    assert curve("stage1/evaluation/zero_shot_top1") == [(20, 11.0), (40, 12.0)]
    assert "stage0/distill_loss" not in run.data.metrics
    assert (run.data.metrics["totals/macs"], run.data.metrics["totals/speedup"]) == (3, 1.5)
    assert (run.data.params["train.global_batch"], run.data.params["chain.1.epochs"]) == ("1024", "200 steps")


def test_another_chain_in_the_same_folder_is_another_run(tmp_path, database):
    for key in ("a", "b", "b"):
        session(tmp_path, {"mlflow": database}, step(0, 4), key=key, name="changed")
    client, runs = mlflow_runs(database, "changed")
    assert len(runs) == 2
    assert all(len(client.get_metric_history(run.info.run_id, "stage0/loss")) == 1 for run in runs)


def test_wandb_continues_one_run_logs_no_step_twice_and_prints_nothing(tmp_path, capfd):
    first = [step(0, 8), measured(0, 8, 10.0), step(1, 20), step(1, 40)]
    assert session(tmp_path, {"wandb": "team/project"}, *first, status="interrupted") == []
    assert session(tmp_path, {"wandb": "team/project"}, step(1, 40), step(1, 60), measured(1, 60, 12.0)) == []
    before, after = wandb_records(tmp_path)
    assert capfd.readouterr().out == ""
    runs = [record.run for record in before + after if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.entity, run.project) for run in runs} == {
        (json.loads((tmp_path / "track-wandb.json").read_text())["id"], "team", "project")
    }
    assert runs[0].display_name == tmp_path.name
    assert [(row["_step"], row.get("stage0/samples"), row.get("stage1/samples")) for row in rows(before)] == [
        (8, 8 * BATCH, None),
        (9, 8 * BATCH, None),
        (28, None, 20 * BATCH),
        (48, None, 40 * BATCH),
    ]
    assert rows(before)[1]["stage0/evaluation/zero_shot_top1"] == 10.0
    assert [row.get("stage1/loss") for row in rows(after)] == [2.5, None]
    assert [row["_step"] for row in rows(after)] == [68, 69]
    text = str(after)
    assert '"succeeded"' in text.replace("\\", "")
    assert "global_batch" in text


def test_a_tracker_that_fails_is_one_warning_and_the_other_goes_on(tmp_path, database):
    track = {"mlflow": f"sqlite:///{tmp_path}/missing/folder/mlflow.db", "wandb": "project"}
    (tmp_path / "missing").write_text("no folder")
    [warning] = session(tmp_path, track, *(step(0, i) for i in range(1, 9)))
    assert warning.startswith("track.mlflow: ")
    assert warning.endswith("nothing more is logged there")
    assert len(rows(wandb_records(tmp_path)[0])) == 8


def test_a_tracker_that_hangs_holds_up_nothing_but_the_end_and_not_for_long(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", lambda _: release.wait())
    monkeypatch.setattr(trackers, "FINISH_S", 0.5)
    started = time.monotonic()
    [warning] = session(tmp_path, {"mlflow": "sqlite:///unused.db"}, step(0, 1))
    release.set()
    assert warning == "track.mlflow: did not take everything within 0.5 s"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(name, monkeypatch):
    track = validate(MINIMAL | {"track": {"wandb": "p", "mlflow": "http://localhost:5000"}}).track
    monkeypatch.setitem(trackers.DISTRIBUTIONS, name, "a-package-that-is-not-installed")
    with pytest.raises(InputError, match=rf"track.{name}\n(.|\n)*pip install 'raychain\[{name}\]'"):
        check_trackers(track)


def test_installed_trackers_and_none_are_accepted():
    check_trackers(validate(MINIMAL | {"track": {"wandb": "p", "mlflow": "http://localhost:5000"}}).track)
    check_trackers(validate(MINIMAL).track)


@pytest.mark.parametrize(
    "track", [{"mlflow": "mlruns"}, {"mlflow": "file:///mlruns"}, {"wandb": "a/b/c"}, {"wandb": ""}]
)
def test_a_target_no_tracker_takes_is_refused(track):
    with pytest.raises(InputError, match="track"):
        validate(MINIMAL | {"track": track})


def test_stage_keys_do_not_depend_on_trackers(tmp_path):
    def keys(**changes):
        reading = Reading((), Order((2048,), 0))
        tree = MINIMAL | {"train": {"warmup": "10 %"}} | changes
        return [stage.key for stage in resolve_stages(validate(tree), [reading] * 2, Folder(str(tmp_path)))]

    assert keys(track={"wandb": "p", "mlflow": "databricks"}) == keys()


@pytest.mark.slow
def test_a_chain_is_tracked_as_its_metrics_file_has_it(ray_session, tree, tmp_path, database):
    tree |= {"name": "tracked", "track": {"wandb": "project", "mlflow": database}}
    run = raychain.run(validate(tree))
    out = tmp_path / "runs" / "tracked"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    client, [tracked] = mlflow_runs(database, "tracked")
    history = rows(wandb_records(out)[0])
    for stage in (0, 1):
        losses = [line["loss"] for line in lines if line["stage"] == stage]
        name = f"stage{stage}/loss"
        assert [point.value for point in client.get_metric_history(tracked.info.run_id, name)] == losses
        assert [row[name] for row in history if name in row] == pytest.approx(losses)
        top1 = run["stages"][stage]["metrics"]["zero_shot_top1"]
        assert tracked.data.metrics[f"stage{stage}/evaluation/zero_shot_top1"] == top1
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["totals/macs"] == run["totals"]["macs"]
    assert raychain.run(validate(tree))["status"] == "succeeded"
    assert len(mlflow_runs(database, "tracked")[1]) == len(wandb_records(out)) == 1
