"""Events reach the method of their kind, in every listener, and stay as they were made."""

from __future__ import annotations

import dataclasses
import importlib
import pickle
import pkgutil
import re
import time
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raychain import backend_ray, events, reporting, runs, searching
from raychain.config.loading import validate
from raychain.core.storage import Folder
from raychain.data.health import Bad, tally
from raychain.evaluators.metrics import FORMER
from raychain.events import CATEGORIES, Event, Listener, Listeners
from raychain.records import ChainedRecord, RunRecord, StageEntry, TotalsRecord
from raychain.reporting.health import DataHealth
from raychain.reporting.progress import Progress
from raychain.reporting.runlog import RunLog
from raychain.reporting.scalars import Scalars
from raychain.reporting.search_progress import SearchProgress
from raychain.reporting.trackers import Trackers

KINDS: tuple[type, ...] = typing.get_args(Event)
METRICS = {"zero_shot_top1": 12.5}
RECORD = StageEntry(key="k" * 16, index=0, model="CoM-micro-S", status="trained", epochs=2, metrics=METRICS)
MADE: list[Any] = [
    events.StageStarted(0, "CoM-micro-S", 311_234, 8, 0, 128, 512, 1, "raw"),
    events.Step(0, 1, 128, 0.25, 2.5, 2.0, 0.5, 1.0, 1e-3, {"logit_scale": 14.3}, 64.0, 0.1, 1),
    events.Span("build", "build", 1.0, 2.0, 0),
    events.Evaluated(0, 4, METRICS),
    events.Measured(0, RECORD),
    events.StageEnded(0, RECORD),
    events.Shared(0, RECORD),
    events.TrunkShared(0, "trunk", 4),
    events.BadSamples("a.tar", "identity", tally([Bad("unreadable picture", "b7", "why")])),
    events.WorkerStarted(0, "node", 12),
    events.Saved(0, 4),
    events.Stopped(0, 4),
    events.Failed("the loss is not finite", (0, 4)),
    events.OutOfMemory("no memory", 0, 64),
    events.Restarted("drain", 2, "a node will be taken away"),
    events.Warned("a word"),
]


def method(kind: type) -> str:
    """The name of a kind's method: `StageStarted` → `stage_started`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()


def methods(listener: type) -> set[str]:
    """The kinds that a listener does something about."""
    return {method(kind) for kind in KINDS if getattr(listener, method(kind)) is not getattr(Listener, method(kind))}


def test_there_is_an_event_of_every_kind_here() -> None:
    assert [type(event) for event in MADE] == list(KINDS)


@pytest.mark.parametrize("event", MADE, ids=lambda event: type(event).__name__)
def test_an_event_reaches_the_method_of_its_kind_alone(event: Event) -> None:
    told: list[tuple[str, Event]] = []

    def hear(name: str) -> Any:
        return lambda self, found: told.append((name, found))

    every = type("Every", (Listener,), {method(kind): hear(method(kind)) for kind in KINDS})
    Listener().dispatch(event)
    Listeners([every(), Listener(), every()]).dispatch(event)
    assert told == [(method(type(event)), event)] * 2


@pytest.mark.parametrize("event", MADE, ids=lambda event: type(event).__name__)
def test_an_event_cannot_be_changed_and_travels_between_processes(event: Event) -> None:
    for field in dataclasses.fields(event):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, field.name, None)
    with pytest.raises((AttributeError, TypeError)):
        event.other = 1  # type: ignore[union-attr]
    assert pickle.loads(pickle.dumps(event)) == event


def test_every_listener_of_a_run_takes_every_event(tmp_path: Path, tree: dict[str, Any]) -> None:
    """Each hears all kinds, in the order of a run, and says nothing of those that are not its."""
    experiment = validate(tree)
    job = SimpleNamespace(
        trial=SimpleNamespace(number=0, kind="sampled", chain=[ChainedRecord(model="CoM-micro-S", epochs=2)]), stages=1
    )
    log = RunLog(Folder(str(tmp_path / "run")), RunRecord(name="demo"), [None])
    listeners: list[Listener] = [
        DataHealth([], 0.01),
        log,
        Progress(["CoM-micro-S"]),
        Scalars(tmp_path / "scalars"),
        Trackers(Folder(str(tmp_path)), experiment, "k", [8], lambda _: None),
        SearchProgress(1, FORMER[0]).of(job),
    ]
    for event in MADE:
        Listeners(listeners).dispatch(event)
    log.finish("succeeded", TotalsRecord())
    assert log.run.stages == [RECORD]
    assert [restart.reason for restart in log.run.restarts or ()] == ["drain"]


def test_every_listener_of_the_package_hears_of_something() -> None:
    for package in (backend_ray, reporting, runs, searching):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found, left = set(), [Listener]
    while left:
        subclasses = left.pop().__subclasses__()
        found |= {kind for kind in subclasses if kind.__module__.startswith("raychain.")}
        left += subclasses
    assert len(found) >= 9
    for listener in found - {Listeners}:
        assert methods(listener), listener


def test_an_event_has_the_time_at_which_it_was_made() -> None:
    before = time.time()
    assert before <= events.Warned("a word").time <= time.time()
    assert events.Warned("a word", time=3.0).time == 3.0


def test_every_category_has_a_row() -> None:
    assert set(CATEGORIES) == set(typing.get_args(events.Category))
