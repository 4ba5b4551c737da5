"""What a failed worker group leads to: another attempt, when, and with how much memory; or the end of the run."""

from __future__ import annotations

from raychain.training.task import StageTask

LONGEST_S = 60.0


class FailurePolicy:
    """Allows `limit` failures in a row. Progress, which is a saved or finished step further than any before, starts
    the count anew: a week on spot nodes has many failures, and only those without progress between them count.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.failures = 0
        self._furthest = (-1, -1)

    def progressed(self, stage: int, step: int) -> None:
        """The state after `step` steps of `stage` is safe."""
        if (stage, step) > self._furthest:
            self._furthest = (stage, step)
            self.failures = 0

    def failed(self) -> float | None:
        """Seconds until the next attempt: none after the first failure, then 2, 4, 8 … 60. None: give up."""
        self.failures += 1
        if self.failures > self.limit:
            return None
        return 0.0 if self.failures == 1 else min(LONGEST_S, 2.0 ** (self.failures - 1))


class MicroBatches:
    """The micro-batch of each stage, halved where a worker's memory was too small for it."""

    def __init__(self, given: int | None) -> None:
        self.given = given
        self._found: dict[int, int] = {}

    def of(self, stage: int) -> int | None:
        """What `stage` begins with; later, larger stages begin with what an earlier one needed."""
        found = [size for index, size in self._found.items() if index <= stage]
        return min(found, default=self.given)

    def too_large(self, stage: int, size: int) -> int | None:
        """`size` did not fit: the next to try, or None if there is no smaller one or the experiment demands it."""
        if size <= 1 or self.given is not None:
            return None
        self._found[stage] = size // 2
        return size // 2


def slower(stage: StageTask, step: int) -> tuple[str, ...]:
    """The "dotted.key=value" with which the stage goes on from `step` at half its learning rate, or begins with that
    where `step` is 0.
    """
    where, lr = f"chain.{stage.index}", float(f"{stage.peak(step) / 2:.3g}")
    if not step:
        return (f"{where}.lr={lr!r}", *((f"{where}.changes=[]",) if stage.changes else ()))
    changes = [*((change.step, change.lr) for change in stage.changes if change.step < step), (step, lr)]
    listed = ", ".join(f"{{at: {at} steps, lr: {rate!r}}}" for at, rate in changes)
    return (f"{where}.changes=[{listed}]",)
