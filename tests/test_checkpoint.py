"""Checkpoints: whole or not used, never unpickled, never waited for."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from payload import Payload

from raychain.core.storage import Folder
from raychain.models import build
from raychain.paradigms.clip.objective import ClipObjective
from raychain.training.average import make_average
from raychain.training.checkpoint import MARKER, Checkpoints
from raychain.training.optimizer import make_optimizer
from raychain.training.state import Counters, TrainState


def state(seed: int) -> TrainState:
    torch.manual_seed(seed)
    student = ClipObjective(build("CoM-micro-S", seed=seed))
    optimizer = make_optimizer(student, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
    return TrainState(student, optimizer, Counters(), make_average(student.model, 10, trained=True))


def step(at: TrainState, number: int) -> None:
    for parameter in at.student.parameters():
        parameter.grad = torch.randn_like(parameter)
    at.optimizer.param_groups[0]["lr"] = 1e-3
    at.optimizer.step()
    at.counters.step, at.counters.samples = number, 32 * number
    at.follow()


def saved(tmp_path: Path, steps: int = 2) -> tuple[Checkpoints, TrainState]:
    checkpoints, at = Checkpoints(Folder(str(tmp_path)), "checkpoints/0-model", "key", keep=2), state(0)
    for number in range(1, steps + 1):
        step(at, number)
        checkpoints.save(at, wait=True)
    return checkpoints, at


def file(tmp_path: Path, number: int, name: str) -> Path:
    return tmp_path / f"checkpoints/0-model/{number:010d}" / name


def test_a_restored_state_is_the_saved_one_and_the_newest_are_kept(tmp_path):
    checkpoints, at = saved(tmp_path, steps=3)
    assert sorted(p.name for p in (tmp_path / "checkpoints/0-model").iterdir()) == ["0000000002", "0000000003"]
    other = state(1)
    assert checkpoints.latest() == 3
    checkpoints.load(3, other)
    assert other.counters == at.counters
    ours, theirs = (x.snapshot({}) for x in (other, at))
    for a, b in ((ours.weights, theirs.weights), (ours.moments, theirs.moments)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def follow_on(at: TrainState, last: int) -> None:
    for number in range(at.counters.step + 1, last + 1):
        torch.manual_seed(number)
        step(at, number)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_average_that_begins_later_starts_from_the_weights_and_survives_being_saved(tmp_path):
    checkpoints, at = Checkpoints(Folder(str(tmp_path)), "trunk", "key", keep=None), state(0)
    at.averaged_from = 2
    for number in range(1, 5):
        follow_on(at, number)
        checkpoints.save(at, wait=True)
        assert (at.model is at.student.model) == (number < 2)
        assert same(at.model.state_dict(), at.student.model.state_dict()) == (number < 3)
    assert [checkpoints.latest(most) for most in (None, 2, 0)] == [4, 2, None]
    for begin in (1, 2, 3):
        other = state(1)
        other.averaged_from = 2
        checkpoints.load(begin, other)
        follow_on(other, 4)
        assert same(other.snapshot({}).moments, at.snapshot({}).moments)
    shorter = state(1)
    shorter.averaged_from = 1
    checkpoints.load(1, shorter)  # saved by a longer stage, whose average had not begun
    assert same(shorter.model.state_dict(), shorter.student.model.state_dict())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "bit flip": lambda path: flip(path / "model.safetensors"),
    "truncated": lambda path: os.truncate(path / "optimizer.safetensors", 1000),
    "missing": lambda path: (path / "optimizer.safetensors").unlink(),
    "pickle": lambda path: (path / "model.safetensors").write_bytes(
        pickle.dumps(Payload(path.parents[2] / "exploded"))
    ),
    "no checksums": lambda path: (path / MARKER).write_text('{"key": "key", "counters": {"step": 2}}'),
    "half-written": lambda path: (path / MARKER).unlink(),
    "another stage's": lambda path: (path / MARKER).write_text((path / MARKER).read_text().replace("key", "yek", 2)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_not_used_but_the_one_before(damage, tmp_path, caplog):
    checkpoints, _ = saved(tmp_path)
    DAMAGES[damage](file(tmp_path, 2, ""))
    assert checkpoints.latest() == 1
    checkpoints.load(1, state(1))
    assert not (tmp_path / "exploded").exists()
    if damage in ("bit flip", "truncated", "missing", "pickle", "no checksums"):
        assert "0000000002 is damaged" in caplog.text
        assert file(tmp_path, 2, "").with_name("0000000002.damaged").exists(), "kept for whoever wants to look"
    assert checkpoints.latest() == 1


def test_training_does_not_wait_for_storage_that_stalls(tmp_path, caplog):
    checkpoints, at = saved(tmp_path, steps=1)
    stalled, publish = threading.Event(), checkpoints.out.publish

    def slow(*args: object) -> None:
        assert stalled.wait(30)
        publish(*args)  # type: ignore[arg-type]

    checkpoints.out.publish = slow  # type: ignore[method-assign, assignment]
    for number in (2, 3, 4):
        step(at, number)
        checkpoints.save(at)  # returns at once
    assert "still being written" in caplog.text
    stalled.set()
    checkpoints.finish()
    assert checkpoints.latest() == 2, "the state of when it was saved, whatever was trained since"
    other = state(1)
    checkpoints.load(2, other)
    assert other.counters.step == 2


def test_a_checkpoint_that_cannot_be_written_is_a_warning_and_leaves_nothing(tmp_path, caplog):
    checkpoints, at = saved(tmp_path, steps=1)
    checkpoints.out.publish = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # type: ignore[method-assign]
    step(at, 2)
    checkpoints.save(at)
    checkpoints.finish()
    assert "training goes on: " in caplog.text
    assert "No space left" in caplog.text
    assert checkpoints.latest() == 1
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(at, wait=True)
