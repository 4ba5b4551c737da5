"""The store of finished stages: what is damaged is noticed and kept aside, what is whole is shared by all runs."""

import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from raychain import records
from raychain.core.storage import Folder
from raychain.lease import Lease
from raychain.records import StageRecord
from raychain.runs import store as store_module
from raychain.runs.store import ForeignStageError, StageStore, UnusableStageError, set_aside, verify

KEY, OTHER = "0123456789abcdef", "fedcba9876543210"
CONFIG, WEIGHTS, OPTIMIZER = "open_clip_config.json", "open_clip_model.safetensors", "optimizer.safetensors"
STAGE = "stages/0-S"


def publish(folder: Folder, name: str = STAGE, key: str = KEY, content: bytes = b"w" * 70_000) -> dict[str, Any]:
    """A stage folder as training leaves it."""
    files = {CONFIG: b"{}", WEIGHTS: content, OPTIMIZER: b"m" * 100}
    for file, data in files.items():
        folder.write(f"{name}/{file}", data)
    record = StageRecord.of(
        {
            "index": 0,
            "model": "S",
            "key": key,
            "status": "trained",
            "checkpoint": name,
            "metrics": {"zero_shot_top1": 0.5},
            "files": {file: hashlib.sha256(data).hexdigest() for file, data in files.items()},
        }
    )
    records.write(folder, f"{name}/stage.json", record)
    return record


@pytest.fixture(params=["disk", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Folder]:
    """Makes folders of one filesystem."""
    match request.param:
        case "disk":
            return lambda name: Folder(f"{tmp_path}/{name}")
        case "memory":
            root = uuid.uuid4().hex
            return lambda name: Folder(f"memory://{root}/{name}")
        case _:
            root, bucket = uuid.uuid4().hex, request.getfixturevalue("bucket")
            return lambda name: Folder(bucket(f"{root}/{name}"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases without long pauses."""
    from raychain import lease

    monkeypatch.setattr(lease, "SETTLE_S", (0.01, 0.02))
    monkeypatch.setattr(lease, "POLL_S", (0.01, 0.05))


def flip(folder: Folder) -> None:
    content = bytearray(folder.read(f"{STAGE}/{WEIGHTS}") or b"")
    content[len(content) // 2] ^= 1
    folder.write(f"{STAGE}/{WEIGHTS}", bytes(content))


def truncate(folder: Folder) -> None:
    folder.write(f"{STAGE}/{WEIGHTS}", (folder.read(f"{STAGE}/{WEIGHTS}") or b"")[:-1])


def lose(folder: Folder) -> None:
    folder.remove(f"{STAGE}/{OPTIMIZER}")


def edit(**changes: Any) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        folder.write_json(f"{STAGE}/stage.json", folder.read_json(f"{STAGE}/stage.json") | changes)

    return change


def unlist(file: str) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        files = folder.read_json(f"{STAGE}/stage.json")["files"]
        del files[file]
        edit(files=files)(folder)

    return change


DAMAGE = {
    "bit flip": (flip, "open_clip_model.safetensors is damaged"),
    "truncated": (truncate, "open_clip_model.safetensors is damaged"),
    "missing": (lose, "optimizer.safetensors is missing"),
    "no weights listed": (unlist(WEIGHTS), "does not list a model's weights"),
    "no optimiser listed": (unlist(OPTIMIZER), "optimizer.safetensors is not listed"),
    "no files": (edit(files=None), "lists no files"),
    "outside": (edit(files={"../../weights": "0"}), "no plain file name"),
    "no key": (edit(key=None), "names no key"),
    "torn record": (lambda folder: folder.write(f"{STAGE}/stage.json", b'{"key"'), "not JSON"),
}


def test_a_whole_stage_verifies(place: Callable[[str], Folder]) -> None:
    folder = place("run")
    assert verify(folder, STAGE, KEY) is None
    record = publish(folder)
    assert verify(folder, STAGE, KEY) == record
    with pytest.raises(ForeignStageError, match=KEY):
        verify(folder, STAGE, OTHER)
    folder.remove(f"{STAGE}/stage.json")
    assert verify(folder, STAGE, KEY) is None


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_described_and_the_folder_kept_aside(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(str(tmp_path))
    publish(folder)
    (act, words) = DAMAGE[damage]
    act(folder)
    before = {name: folder.read(f"{STAGE}/{name}") for name in folder.list(STAGE)}
    with pytest.raises(UnusableStageError, match=words) as caught:
        verify(folder, STAGE, KEY)
    with caplog.at_level(logging.WARNING, "raychain.runs"):
        assert set_aside(folder, STAGE, caught.value) == f"{STAGE}.damaged-1"
    assert words in caplog.text
    assert f"{STAGE}.damaged-1" in caplog.text
    assert folder.list("stages") == ["0-S.damaged-1"]
    assert {name: folder.read(f"{STAGE}.damaged-1/{name}") for name in before} == before


def test_names_of_what_is_set_aside_do_not_meet(place: Callable[[str], Folder]) -> None:
    folder = place("run")
    for n in (1, 2):
        publish(folder, content=b"%d" % n)
        assert set_aside(folder, STAGE, UnusableStageError("bad")) == f"{STAGE}.damaged-{n}"
    publish(folder, key=OTHER)
    assert set_aside(folder, STAGE, ForeignStageError(OTHER)) == f"{STAGE}.fedcba98"
    publish(folder, key=OTHER)
    assert set_aside(folder, STAGE, ForeignStageError(OTHER)) == f"{STAGE}.fedcba98-2"
    publish(folder)
    assert set_aside(folder, STAGE, ForeignStageError("../../etc")) == f"{STAGE}.et"
    assert [folder.read(f"{STAGE}.damaged-{n}/{WEIGHTS}") for n in (1, 2)] == [b"1", b"2"]
    assert len(folder.list("stages")) == 5


def test_a_stage_goes_through_the_store_to_another_run(place: Callable[[str], Folder]) -> None:
    store, one, two = StageStore(place("")), place("one"), place("two")
    assert store.adopt(KEY, two, "3-T") is None
    assert not two.exists("stages")
    record = publish(one)
    assert store.contribute(KEY, one, "0-S")
    assert verify(store.storage, f"store/{KEY}", KEY) == record
    assert not store.contribute(KEY, one, "0-S")
    adopted = store.adopt(KEY, two, "3-T", {"index": 3, "model": "T"})
    assert adopted == record.model_copy(update={"index": 3, "model": "T", "checkpoint": "stages/3-T"})
    assert verify(two, "stages/3-T", KEY) == adopted
    assert store.adopt(KEY, two, "3-T") == adopted
    assert sorted(two.list("stages/3-T")) == sorted([*record.files, "stage.json"])


def test_a_disk_holds_a_stage_once(tmp_path: Path) -> None:
    storage, one, two = (Folder(f"{tmp_path}/{name}") for name in ("", "one", "two"))
    publish(one)
    store = StageStore(storage)
    store.contribute(KEY, one, "0-S")
    store.adopt(KEY, two, "0-S")
    inodes = {(tmp_path / place / WEIGHTS).stat().st_ino for place in (f"one/{STAGE}", f"two/{STAGE}", f"store/{KEY}")}
    assert len(inodes) == 1
    local = tmp_path / "again"
    local.mkdir()
    (local / WEIGHTS).write_bytes(b"new")
    (local / "stage.json").write_text("{}")
    two.publish(local, STAGE, "stage.json")
    assert two.read(f"{STAGE}/{WEIGHTS}") == b"new"
    assert verify(one, STAGE, KEY), "what replaces a linked file leaves the other links alone"


def test_a_disk_without_links_and_another_disk_get_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    one, two = Folder(f"{tmp_path}/one"), Folder(f"{tmp_path}/two")
    publish(one)
    assert StageStore(two).contribute(KEY, one, "0-S")
    assert verify(two, f"store/{KEY}", KEY)
    assert (tmp_path / "two" / "store" / KEY / WEIGHTS).stat().st_nlink == 1


@pytest.mark.parametrize("run_is_remote", [True, False])
def test_runs_on_disk_share_a_store_on_object_storage(
    tmp_path: Path, bucket: Callable[[str], str], run_is_remote: bool
) -> None:
    ends = [Folder(bucket(uuid.uuid4().hex)), Folder(str(tmp_path))]
    run, storage = ends if run_is_remote else reversed(ends)
    store = StageStore(storage)
    publish(run, content=os.urandom(6_000_000))
    assert store.contribute(KEY, run, "0-S")
    run.delete("stages")
    assert store.adopt(KEY, run, "0-S")
    assert verify(run, STAGE, KEY)


def test_what_is_not_listed_is_neither_opened_nor_copied(place: Callable[[str], Folder], tmp_path: Path) -> None:
    one, two = place("one"), place("two")
    publish(one)
    one.write(f"{STAGE}/open_clip_pytorch_model.bin", b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    if one.local:
        os.mkfifo(f"{one.path}/{STAGE}/weights.pkl")  # to open it would block for ever
    store = StageStore(place(""))
    assert verify(one, STAGE, KEY)
    store.contribute(KEY, one, "0-S")
    store.storage.write(f"store/{KEY}/extra.pkl", b"x")
    store.adopt(KEY, two, "0-S")
    assert two.list(STAGE) == sorted([CONFIG, WEIGHTS, OPTIMIZER, "stage.json"])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_stage_is_not_contributed(tmp_path: Path, damage: str) -> None:
    run = Folder(f"{tmp_path}/run")
    publish(run)
    DAMAGE[damage][0](run)
    store = StageStore(Folder(str(tmp_path)))
    with pytest.raises(UnusableStageError, match=DAMAGE[damage][1]):
        store.contribute(KEY, run, "0-S")
    assert store.adopt(KEY, Folder(f"{tmp_path}/two"), "0-S") is None


def test_only_a_complete_stage_of_the_key_is_contributed(tmp_path: Path) -> None:
    run, store = Folder(f"{tmp_path}/run"), StageStore(Folder(str(tmp_path)))
    with pytest.raises(UnusableStageError, match="not complete"):
        store.contribute(KEY, run, "0-S")
    publish(run, key=OTHER)
    with pytest.raises(ForeignStageError):
        store.contribute(KEY, run, "0-S")


def test_a_stage_damaged_in_the_store_is_set_aside_and_replaced(
    place: Callable[[str], Folder], caplog: pytest.LogCaptureFixture
) -> None:
    store, one, two = StageStore(place("")), place("one"), place("two")
    publish(one)
    publish(store.storage, f"store/{KEY}", content=b"bad")
    store.storage.write(f"store/{KEY}/{WEIGHTS}", b"worse")
    assert store.adopt(KEY, two, "0-S") is None
    assert "damaged (SHA-256" in caplog.text
    assert two.list(STAGE) == []
    assert store.storage.read(f"store/{KEY}.damaged-1/{WEIGHTS}") == b"worse"
    assert store.contribute(KEY, one, "0-S")
    store.storage.write(f"store/{KEY}/{WEIGHTS}", b"bad again")
    assert store.contribute(KEY, one, "0-S")
    assert verify(one, STAGE, KEY)
    assert store.adopt(KEY, two, "0-S")
    assert f"{KEY}.damaged-2" in store.storage.list("store")


def test_the_run_folders_own_is_kept_aside_or_replaced(tmp_path: Path) -> None:
    store, run = StageStore(Folder(str(tmp_path))), Folder(f"{tmp_path}/run")
    publish(store.storage, f"store/{KEY}")
    publish(run, key=OTHER, content=b"other")
    assert store.adopt(KEY, run, "0-S")
    assert run.read(f"{STAGE}.fedcba98/{WEIGHTS}") == b"other"
    flip(run)
    assert store.adopt(KEY, run, "0-S")
    assert run.list("stages") == ["0-S", "0-S.damaged-1", "0-S.fedcba98"]
    run.remove(f"{STAGE}/stage.json")
    run.write(f"{STAGE}/half", b"")
    assert store.adopt(KEY, run, "0-S")
    assert not run.exists(f"{STAGE}/half")


@pytest.mark.parametrize("place", ["disk", "memory"], indirect=True)
def test_a_crash_at_any_write_leaves_nothing_that_counts(place: Callable[[str], Folder]) -> None:
    """Contributing and adopting are cut off at every file in turn, and done again."""
    one = place("one")
    publish(one)

    class Crash(BaseException):
        pass

    for limit in itertools.count():
        store, two = StageStore(place(f"storage-{limit}")), place(f"two-{limit}")
        made = 0

        def step(action: Callable[..., Any], limit: int = limit) -> Callable[..., Any]:
            def counted(folder: Folder, file: str, *arguments: Any) -> Any:
                nonlocal made
                if ".leases" not in file:
                    made += 1
                    if made > limit:
                        raise Crash
                return action(folder, file, *arguments)

            return counted

        with pytest.MonkeyPatch.context() as patch:
            for name in ("copy_file", "write"):
                patch.setattr(Folder, name, step(getattr(Folder, name)))
            try:
                store.contribute(KEY, one, "0-S")
                store.adopt(KEY, two, "0-S")
            except Crash:
                pass
            else:
                break
        contributed, adopted = made > 4, made > 8
        assert (verify(store.storage, f"store/{KEY}", KEY) is not None) == contributed
        assert (verify(two, STAGE, KEY) is not None) == adopted
        store.contribute(KEY, one, "0-S")
        assert store.adopt(KEY, two, "0-S")
        assert verify(two, STAGE, KEY)
    assert limit == 8


def test_scratch_files_of_a_crashed_contributor_are_removed(tmp_path: Path) -> None:
    store, run = StageStore(Folder(str(tmp_path))), Folder(f"{tmp_path}/run")
    record = publish(run)
    store.storage.write(f"store/{KEY}/{WEIGHTS}.1234.tmp", b"half")
    assert store.contribute(KEY, run, "0-S")
    assert store.storage.list(f"store/{KEY}") == sorted([*record.files, "stage.json"])


def test_a_contributor_that_lost_its_lease_completes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, run = StageStore(Folder(str(tmp_path)), stale_s=0.1), Folder(f"{tmp_path}/run")
    publish(run)
    copy = store_module._copy
    monkeypatch.setattr(Lease, "_beat", lambda *_: None)
    monkeypatch.setattr(store_module, "_copy", lambda *a: (time.sleep(0.2), copy(*a)))
    with pytest.raises(OSError, match="not completed"):
        store.contribute(KEY, run, "0-S")
    assert verify(store.storage, f"store/{KEY}", KEY) is None


def test_a_damaged_stage_in_a_store_that_cannot_be_written_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, run = StageStore(Folder(str(tmp_path))), Folder(f"{tmp_path}/run")
    publish(store.storage, f"store/{KEY}")
    store.storage.write(f"store/{KEY}/{WEIGHTS}", b"bad")

    def refuse(*_: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(store.storage, "write", refuse)
    assert store.adopt(KEY, run, "0-S") is None
    assert "read-only" in caplog.text


def contribute(root: str, name: str, rounds: int, together: Any) -> None:
    for n in range(rounds):
        run, key = Folder(f"{root}/{name}"), f"key-{n}"
        publish(run, f"stages/{n}-S", key, f"{name} {n}".encode() * 50_000)
        together.wait(30)
        StageStore(Folder(root)).contribute(key, run, f"{n}-S")


def test_of_contributors_at_once_the_store_keeps_one_whole_stage(tmp_path: Path) -> None:
    """Their stages have the same keys and differ, as results of different machines may."""
    spawn, rounds = multiprocessing.get_context("spawn"), 12
    together = spawn.Barrier(2)
    other = spawn.Process(target=contribute, args=(str(tmp_path), "a", rounds, together), daemon=True)
    other.start()
    contribute(str(tmp_path), "b", rounds, together)
    other.join(60)
    assert other.exitcode == 0
    for n in range(rounds):
        record = verify(Folder(str(tmp_path)), f"store/key-{n}", f"key-{n}")
        assert record is not None
        ours = [json.loads((tmp_path / run / f"stages/{n}-S/stage.json").read_text()) for run in ("a", "b")]
        assert record.content() in ours
    assert not [name for name in Folder(str(tmp_path)).list("store") if "damaged" in name]


def weights(*values: float) -> bytes:
    return save({"visual.proj": torch.ones(4), "text.proj": torch.tensor(values)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_stage_whose_weights_are_not_finite_is_set_aside_like_a_damaged_one(place, value: float) -> None:
    """Versions before this one could publish such a stage; its checksums are right."""
    run, store = place("run"), StageStore(place("storage"))
    publish(run, content=weights(1, value))
    with pytest.raises(UnusableStageError, match=r"1 of 2 tensors are not finite, first text\.proj"):
        verify(run, STAGE, KEY)
    with pytest.raises(UnusableStageError, match="not finite"):
        store.contribute(KEY, run, "0-S")
    assert not store.has(KEY)
    assert store_module.usable(run, STAGE, KEY) is None
    assert run.list("stages") == ["0-S.damaged-1"]


def test_a_stage_of_the_store_that_is_not_finite_is_not_taken(place) -> None:
    run, storage = place("run"), place("storage")
    publish(storage, f"store/{KEY}", content=weights(1, float("nan")))
    assert StageStore(storage).adopt(KEY, run, "0-S") is None
    assert f"{KEY}.damaged-1" in storage.list("store")
    publish(storage, f"store/{KEY}", content=weights(1, 2))
    assert StageStore(storage).adopt(KEY, run, "0-S") is not None
