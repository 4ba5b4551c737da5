"""Whatever the records of a run, a stage, a checkpoint or a search hold: one warning, and nothing finished is lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import raychain
from raychain import records
from raychain.backend_ray import connection
from raychain.config.loading import validate
from raychain.core.json import plain
from raychain.core.storage import Folder
from raychain.errors import InputError
from raychain.lease import LEASE, Lease, is_abandoned
from raychain.training.checkpoint import Checkpoints

ODD = [0, -1, 2.5, True, None, "", "\ud800", "x" * 300, [], {}, [[1]], {"a": {"b": 1}}, 10**30, 1e300, -0.0]
LEAVES = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
RAW = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 5000,
    b'{"a":' * 500 + b"1" + b"}" * 500,
    b"NaN",
    b'{"key": Infinity}',
    b"9" * 9000,
]
BROAD = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in paths(inner, (*path, key)))]


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """The JSON value with another one at one of its places."""
    if not place:
        return new
    copy = value.copy()
    copy[place[0]] = changed(value[place[0]], place[1:], new)
    return copy


@st.composite
def odd(draw: st.DrawFn, good: bytes) -> bytes:
    """A record that is nearly right, or not at all."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(RAW) | ANYTHING.map(lambda value: json.dumps(value).encode()))
    value = json.loads(good)
    return json.dumps(changed(value, draw(st.sampled_from(paths(value))), draw(ANYTHING))).encode()


FILES = [
    "run.json",
    "trace.json",
    "metrics.jsonl",
    "stages/0-CoM-micro-S/stage.json",
    "stages/1-CoM-micro-M/stage.json",
]


@settings(BROAD, max_examples=60)
@given(data=st.data())
def test_any_record_gives_a_page(data, finished):
    _, out, _ = finished
    file = out / data.draw(st.sampled_from(FILES))
    good = file.read_bytes()
    lines = good.splitlines()
    file.write_bytes(data.draw(odd(lines[0] if file.suffix == ".jsonl" else good)))
    try:
        raychain.report(out)
    except InputError:
        assert file.name == "run.json"
    finally:
        file.write_bytes(good)


@settings(BROAD, max_examples=25)
@given(data=st.data())
def test_a_finished_run_is_still_finished_whatever_its_records_hold(data, finished):
    """Stages come from the store where those of the run folder are damaged, and Ray is not needed for it."""
    first, out, tree = finished
    file = out / data.draw(st.sampled_from(FILES))
    good = file.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection.ray, "init", None)
        patch.setattr("raychain.runs.driver._execute", lambda *_: True)  # what is measured once more
        file.write_bytes(data.draw(odd(good.splitlines()[0] if file.suffix == ".jsonl" else good)))
        run = raychain.run(validate(tree))
    assert run["status"] == "succeeded"
    assert [s["key"] for s in run["stages"]] == [s["key"] for s in first["stages"]]
    assert json.loads((out / "run.json").read_text())["status"] == "succeeded"
    shutil.rmtree(out)
    shutil.copytree(Path(tree["storage"]).parent / "untouched", out)


@pytest.fixture(autouse=True)
def _untouched(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if "finished" in request.fixturenames:
        _, out, _ = request.getfixturevalue("finished")
        shutil.copytree(out, tmp_path / "untouched")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["folder", "dangling link", "pipe", "deep"])
def test_what_is_no_record_at_all_is_set_aside_or_made_again(name, kind, finished, caplog):
    first, out, tree = finished
    file = out / name
    file.unlink()
    if kind == "folder":
        (file / "inside").mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "deep":
        file.write_bytes(b"[" * 5000 + b"\n")
    else:
        file.symlink_to("/nowhere/at/all")
    if name != "run.json":
        raychain.report(out)
    run = raychain.run(validate(tree))
    assert [s["key"] for s in run["stages"]] == [s["key"] for s in first["stages"]]
    assert file.is_file() or (name == "metrics.jsonl" and not os.path.lexists(file))  # no step was trained
    if kind == "folder":
        assert len([m for m in caplog.messages if "damaged-1" in m or "kept as" in m]) == 1
        assert list(out.rglob("inside"))
    raychain.report(out)


def test_metrics_of_a_wrong_kind_are_measured_again_and_the_stage_is_kept(finished):
    first, out, tree = finished
    file = out / "stages/1-CoM-micro-M/stage.json"
    shutil.rmtree(out.parent / "store")
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"metrics": [1], "evaluations": [1], "wall_s": "long", "mine": {"kept": 1}}))
    run = raychain.run(validate(tree))
    assert [s["status"] for s in run["stages"]] == ["reused", "reused"]
    assert run["stages"][1]["metrics"] == pytest.approx(first["stages"][1]["metrics"], abs=0.2)
    assert json.loads(file.read_text())["files"] == record["files"]
    assert json.loads(file.read_text())["mine"] == {"kept": 1}


CHECKPOINT = {
    "key": "k" * 16,
    "counters": {"step": 3, "samples": 96, "wall_s": 1.5, "data_wait_s": 0.5, "gap_s": None},
    "files": {"model.safetensors": "0" * 32, "optimizer.safetensors": "1" * 32},
}


@settings(BROAD, max_examples=100)
@given(content=odd(json.dumps(CHECKPOINT).encode()))
def test_any_state_json_is_passed_over(content, tmp_path):
    folder = tmp_path / "states" / "0000000003"
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "state.json").write_bytes(content)
    states = Checkpoints(Folder(str(tmp_path)), "states", "k" * 16, None)
    assert states.latest() is None
    states.arrange(["k" * 16])
    states.marker(3)


CLAIM = {"host": "here", "pid": 4, "process": "here/boot/pid:[1]/12", "counter": 3, "held": True}


@settings(BROAD, max_examples=25)
@given(content=odd(json.dumps(CLAIM).encode()))
def test_any_claim_on_a_lease_is_one_that_goes_stale(content, tmp_path):
    folder = Folder(str(tmp_path))
    folder.write(f"{LEASE}/a.json", content)
    (tmp_path / LEASE / "b.json").mkdir(exist_ok=True)
    lease = Lease(folder, LEASE, stale_s=0.1, settle_s=0, poll_s=0.02)
    assert lease.acquire()
    lease.release()
    is_abandoned(folder, LEASE)


@settings(BROAD, max_examples=200)
@given(value=ANYTHING, kind=st.sampled_from([records.RunRecord, records.StageRecord, records.SearchRecord]))
def test_a_cleaned_record_is_the_content_less_its_wrong_fields(value, kind):
    found, wrong = records.clean(value, kind)
    if found is not None:
        kept = {name: field for name, field in value.items() if name not in wrong}
        assert found.content() == {"schema": kind.SCHEMA} | plain(kept)
        assert records.is_a(found.content(), kind)
        assert json.loads(found.document()) == found.content()


NEWER = {"run.json": 2, "stages/1-CoM-micro-M/stage.json": 2}


@pytest.mark.parametrize("name", NEWER)
def test_a_record_of_a_newer_version_is_refused_and_left_as_it_is(name, finished):
    _, out, tree = finished
    file = out / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": NEWER[name]}))
    content = file.read_bytes()
    with pytest.raises(InputError) as refused:
        raychain.run(validate(tree))
    assert f"schema {NEWER[name]}, which a newer raychain wrote" in str(refused.value)
    assert name in str(refused.value)
    assert file.read_bytes() == content
    assert not list(out.rglob("*.damaged*"))


WRITTEN = {
    "run": records.RunRecord,
    "stage": records.StageRecord,
    "stage-of-0.1": records.StageRecord,
    "search": records.SearchRecord,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_files_that_were_written_before_records_had_models_are_read_and_written_as_they_were(name):
    content = json.loads((Path(__file__).parent / "golden" / "records" / f"{name}.json").read_text())
    record, wrong = records.clean(content, WRITTEN[name])
    assert wrong == []
    assert json.loads(record.document()) == {"schema": 1} | content


@pytest.mark.parametrize("kind", [records.RunRecord, records.StageRecord, records.SearchRecord])
def test_a_version_that_is_none_counts_as_the_usual_one(kind):
    needed = {"key": "k", "identity": "i", "stages": []}
    for odd_version in (True, "2", 0, -1, 10**30, 1.5, None):
        found, wrong = records.clean(needed | {"schema": odd_version}, kind)
        assert (found.version, wrong) == (kind.SCHEMA, ["schema"])


def test_a_large_whole_number_is_written_as_it_was_read():
    """Training MACs are beyond what a float holds exactly."""
    content = json.dumps({"key": "k", "macs": 2**70 + 1, "epochs": 3, "lr": 1.0}).encode()
    record = records.parse(content, records.StageRecord)
    assert json.loads(record.document()) == {"schema": 1} | json.loads(content)
    assert b'"epochs": 3,' in record.document()


@pytest.mark.parametrize("content", RAW)
def test_the_reader_itself_takes_any_bytes(content, tmp_path):
    folder = Folder(str(tmp_path))
    folder.write("run.json", content)
    assert records.read(folder, "run.json", records.TrackRecord) is None
    assert records.take(folder, "run.json", records.TrackRecord) is None
    assert folder.list() == ["run.json.damaged-1"]
    folder.write("run.json", content)
    records.take(folder, "run.json", records.TrackRecord)
    assert folder.list() == ["run.json.damaged-1", "run.json.damaged-2"]


def test_a_run_whose_driver_was_killed_is_shown_as_interrupted(finished):
    _, out, _ = finished
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(run | {"status": "running"}))
    with Lease(Folder(str(out)), LEASE) as lease:
        lease.acquire()
        claim = next((out / LEASE).glob("*.json"))
        content = json.loads(claim.read_text())
        raychain.report(out)
        assert "▶</i> running" in (out / "report.html").read_text()
    claim.write_text(json.dumps(content | {"process": content["process"].rpartition("/")[0] + "/1"}))
    raychain.report(out)
    assert "❚❚</i> interrupted" in (out / "report.html").read_text()
