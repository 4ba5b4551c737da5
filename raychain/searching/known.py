"""What the storage has already of the stages that a search wants."""

from __future__ import annotations

from raychain import records
from raychain.core.storage import Folder
from raychain.records import StageEntry, StageRecord
from raychain.reporting.search_progress import SearchProgress
from raychain.runs.store import STORE, StageStore
from raychain.runs.takeover import take_over_in_store
from raychain.searching.request import Plan
from raychain.searching.trials import Step
from raychain.training.finished import STAGE_RECORD
from raychain.training.states import trunk_states


class Known:
    """The record of a stage, or of a part of a trunk, that the storage has; None where the stage is to be trained, or
    measured."""

    def __init__(self, plan: Plan, progress: SearchProgress) -> None:
        self._plan, self._progress = plan, progress
        self._store = StageStore(Folder(plan.store))

    def __call__(self, step: Step) -> StageEntry | None:
        if not step.whole:
            state = trunk_states(self._plan.store, step.stage.trunk).marker(int(step.key.partition("@")[2]))
            return StageEntry(key=step.key) if state else None
        if not self._store.has(step.key):
            take_over_in_store(self._plan.base, step.stage, self._store, self._progress.say)
        if not self._store.has(step.key):
            return None
        record = records.read(self._store.storage, f"{STORE}/{step.key}/{STAGE_RECORD}", StageRecord)
        suite = self._plan.base.suite
        return suite.shown(record) if record is not None and not suite.missing(record) else None
