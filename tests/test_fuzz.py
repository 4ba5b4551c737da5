"""`experiments/fuzz`: what it takes for a fault, how it makes inputs smaller, and that it runs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import strategies as st

from raychain.errors import InputError, RunFailed

FUZZ = Path(__file__).parents[1] / "experiments" / "fuzz"


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(FUZZ))
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("worker")


def raising(error: BaseException | None) -> Callable[[Path], None]:
    def action(_: Path) -> None:
        if error:
            raise error

    return action


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(None, "accepted"), (InputError("a", "b", "c", "d"), "refused"), (RunFailed("x"), "refused"),
     (ValueError("x"), "fault"), (MemoryError(), "fault"), (OSError("x"), "fault")],
)  # fmt: skip
def test_what_is_no_message_of_raychain_is_a_fault(
    worker: ModuleType, tmp_path: Path, error: Any, outcome: str
) -> None:
    assert worker.step({"a/b": b"x"}, raising(error), tmp_path).outcome == outcome
    assert (tmp_path / "a" / "b").read_bytes() == b"x"


def test_commands_are_called(worker: ModuleType, tmp_path: Path) -> None:
    assert worker.step({}, ["report", str(tmp_path)], tmp_path).outcome == "refused"
    assert worker.step({"x.yaml": b"name: ["}, ["run", "x.yaml", "--dry-run"], tmp_path).outcome == "refused"
    assert worker.step({}, ["--help"], tmp_path).outcome == "accepted"


def planted(folder: Path) -> None:
    """A fault in what has three bytes or more."""
    if len((folder / "x").read_bytes()) >= 3:
        raise KeyError("planted")


def test_a_fault_is_made_smaller_kept_and_can_be_tried_again(
    worker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.kinds, "planted", planted, raising=False)
    monkeypatch.setattr(worker, "LARGEST", 2**40)  # this process holds what all tests before have imported
    monkeypatch.setitem(worker.kinds.KINDS, "x", st.binary(max_size=500).map(lambda b: [({"x": b}, planted)]))
    told: list[dict[str, Any]] = []
    trying = worker.Trying("x", 0, tmp_path, tmp_path / "faults")
    monkeypatch.setattr(trying, "tell", lambda **message: told.append(message))
    monkeypatch.setattr(trying, "wait", lambda: None)
    for number in range(2):
        trying.round(number)
    faults = [message["fault"] for message in told if "fault" in message]
    assert len(faults) == 1, "one of a kind is shown"
    document = json.loads((tmp_path / "faults" / faults[0]["file"]).read_text())
    assert "planted" in document["said"]
    assert len(worker.loaded(document)[0][0]["x"]) == 3
    trying.one(worker.loaded(document))
    assert told[-1]["outcome"] == "fault"


@pytest.mark.long
def test_a_short_run_is_clean_and_leaves_a_record(tmp_path: Path) -> None:
    command = [sys.executable, FUZZ / "run.py", "--minutes", "0.5", "--seed", "7", "--faults", tmp_path / "faults"]
    done = subprocess.run([*command, "--out", tmp_path / "record.json"], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr + done.stdout
    record = json.loads((tmp_path / "record.json").read_text())
    assert min(found["inputs"] for found in record["kinds"].values()) > 5
    assert not (tmp_path / "faults").exists()
