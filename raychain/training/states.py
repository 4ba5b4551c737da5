"""What is saved of an unfinished stage: its own checkpoints, and its trunk's states, which other stages share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from raychain.core.storage import Folder
from raychain.events import Event, Saved, TrunkShared
from raychain.training.checkpoint import Checkpoints
from raychain.training.state import TrainState
from raychain.training.task import ChainTask, StageTask

TRUNKS = "store/.trunks"
"""States before a cool-down, in the storage: `<trunk>/<step>/`. They may be deleted at any time."""


class Resumed(NamedTuple):
    """The step to resume from (0: a fresh start), and the checkpoints that hold it."""

    step: int
    states: Checkpoints


class StageStates:
    """The saved states of one stage. Every rank has them; rank 0 alone reads and writes."""

    def __init__(self, task: ChainTask, stage: StageTask, emit: Callable[[Event], None]) -> None:
        def saved(step: int) -> None:
            emit(Saved(stage.index, step))

        def shared(trunk: str) -> Callable[[int], None]:
            return lambda step: emit(TrunkShared(stage.index, trunk, step))

        name, keep = f"checkpoints/{stage.folder}", task.experiment.checkpoint.keep
        self._keys = (*(change.key for change in stage.changes), stage.key)
        self._own = Checkpoints(Folder(task.out), name, stage.key_at, keep, saved)
        self._trunks: list[tuple[Checkpoints, int]] = []
        """The trunk up to each change, and all of it; with each the last step at which its states are the stage's."""
        if stage.trunk and task.store is not None:
            trunks = [*((change.trunk, change.step) for change in stage.changes), (stage.trunk, stage.steps)]
            for trunk, last in trunks:
                self._trunks.append((trunk_states(task.store, trunk, shared(trunk)), min(last, stage.averaged_from)))
        self._all = [(self._own, stage.steps), *self._trunks]
        self.broken = False
        """A state that was to be saved is not finite."""

    def furthest(self, most: int | None = None) -> tuple[int, int]:
        """Step of the furthest state there is (0: none), of `most` steps where given, and where it is, as `resumed`
        takes it. What is damaged, not finite or of other settings is moved out of the way.
        """
        self._own.arrange(self._keys)
        bounds = [(states, last if most is None else min(last, most)) for states, last in self._all]
        found = [states.latest(last) or 0 for states, last in bounds]
        return max(found), found.index(max(found))

    def resumed(self, step: int, place: int) -> Resumed:
        """What `furthest` found on rank 0."""
        return Resumed(step, self._all[place][0])

    def save(self, state: TrainState, *, last: bool) -> None:
        """Saves the state, and waits for it if it is the `last`; one that is not finite makes this `broken` instead."""
        self.broken = not self._own.save(state, wait=last) or self.broken

    def share(self, state: TrainState) -> None:
        """Saves the state for stages of other lengths, where there is a trunk."""
        for trunk, last in self._trunks:
            if state.counters.step <= last:
                trunk.finish()
                self.broken = not trunk.save(state) or self.broken
                return

    def finish(self) -> None:
        """Waits for what is being written."""
        for states, _ in self._all:
            states.finish()

    def clear(self) -> None:
        """Removes the stage's own states, as it is finished, once all is written."""
        self.finish()
        self._own.clear()


def trunk_states(store: str, trunk: str, saved: Callable[[int], None] = lambda _: None) -> Checkpoints:
    """The states of a trunk in the storage `store`."""
    return Checkpoints(Folder(store), f"{TRUNKS}/{trunk}", trunk, None, saved)
