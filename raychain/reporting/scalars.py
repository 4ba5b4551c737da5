"""TensorBoard event files: one TensorBoard run a stage, so that the stages' curves lie over each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raychain.events import Evaluated, Listener, StageEnded, StageStarted, Step

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Scalars(Listener):
    """Writes `FOLDER/stage<index>-<model>/`; the horizontal axis is samples seen by the stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[int, SummaryWriter] = {}
        self._batch: dict[int, int] = {}

    def stage_started(self, event: StageStarted) -> None:
        """Opens a stage's run. Points that the resumed stage will write again are purged."""
        from torch.utils.tensorboard import SummaryWriter  # takes seconds, and reused stages need none of it

        stage, batch, first = event.stage, event.global_batch, event.start_step
        if stage in self._writers:
            self._writers[stage].close()
        name = f"stage{stage}-{event.model.replace('/', '_')}"
        purge = first * batch + 1 if first else 0
        self._writers[stage] = SummaryWriter(str(self.folder / name), purge_step=purge, flush_secs=10)
        self._batch[stage] = batch

    def step(self, event: Step) -> None:
        """Writes the step's scalars."""
        if writer := self._writers.get(event.stage):
            for tag, value in event.scalars().items():
                if value is not None:
                    writer.add_scalar(tag, value, event.samples, walltime=event.time)

    def evaluated(self, event: Evaluated) -> None:
        """Writes the metrics as `evaluation/<metric>`."""
        if writer := self._writers.get(event.stage):
            samples = event.step * self._batch[event.stage]
            for name, value in event.metrics.items():
                if value is not None:
                    writer.add_scalar(f"evaluation/{name}", value, samples, walltime=event.time)

    def stage_ended(self, event: StageEnded) -> None:  # noqa: ARG002 - of any stage
        """Brings what was written to disk."""
        self.flush()

    def flush(self) -> None:
        """Brings what was written to disk."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Closes the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
