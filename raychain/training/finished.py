"""Finished stages in the run folder: written, read, and completed by what is measured of them later."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from raychain import records
from raychain.core.finite import not_finite
from raychain.core.storage import Folder, patiently
from raychain.evaluators.suite import Results
from raychain.growth import Moments
from raychain.paradigms.base import Config, Paradigm
from raychain.records import ChangeRecord, OriginRecord, StageEntry, StageRecord
from raychain.training.artifact import load_moments, write_artifact
from raychain.training.state import Counters, TrainState, all_finite
from raychain.training.task import ChainTask, StageTask

STAGE_RECORD = "stage.json"


class Trained(NamedTuple):
    """A finished stage's model, and AdamW's moments at its end."""

    model: nn.Module
    moments: Moments | None

    def resized(self, paradigm: Paradigm, config: Config, size: int) -> Trained:
        """The same for inputs of another size. Interpolated position embeddings have no moments."""
        model = paradigm.adapt(self.model, config, size)
        if model is self.model or self.moments is None:
            return Trained(model, self.moments)
        step, *moments = self.moments.step, self.moments.exp_avg, self.moments.exp_avg_sq
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        kept = [{name: value for name, value in m.items() if value.shape == shapes[name]} for m in moments]
        return Trained(model, Moments(step, *kept))


class FinishedStages:
    """The chain's stages that are finished. Rank 0 alone writes."""

    def __init__(self, task: ChainTask) -> None:
        self._task, self._out = task, Folder(task.out)

    def record(self, stage: StageTask) -> StageRecord | None:
        """The record of the stage; None if it is not finished."""
        name = f"stages/{stage.folder}/{STAGE_RECORD}"
        record = records.read(self._out, name, StageRecord, quiet=True)
        return record if record is not None and record.key == stage.key else None

    def load(self, stage: StageTask, device: torch.device) -> Trained:
        """A finished stage. Raises FloatingPointError if it is not finite, as versions before checked none."""
        with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
            folder = self._out.fetch(f"stages/{stage.folder}", Path(scratch) / "stage")
            model, moments = self._task.paradigm.load(folder), load_moments(folder)
            if (problem := not_finite(model.state_dict())) is not None:
                raise FloatingPointError(f"stages/{stage.folder} cannot be gone on from: {problem}")
        found = [*moments.exp_avg.values(), *moments.exp_avg_sq.values()] if moments else []
        if not all_finite(found):
            shared = f" and store/{stage.key} in {self._task.store}" if self._task.store else ""
            raise FloatingPointError(
                f"{stage.model} is finished, but its AdamW moments are not finite. "
                f"Remove stages/{stage.folder} in {self._out.address}{shared} to train it again."
            )
        return Trained(model.to(device), moments)

    def publish(self, stage: StageTask, state: TrainState, moments: Moments) -> StageEntry:
        """Writes the stage's folder, and returns it as runs show it, without metrics yet. Raises OSError."""
        return self._write(stage, state.counters, Trained(state.model, moments), state.student.projector)

    def give(self, stage: StageTask, found: Trained) -> StageEntry:
        """The same of a checkpoint that is a stage, or that one starts from."""
        return self._write(stage, Counters(), found, None)

    def _write(self, stage: StageTask, counters: Counters, found: Trained, projector: nn.Module | None) -> StageEntry:
        transfer = self._task.experiment.transfer
        grown = stage.given is None and self._task.before(stage) is not None
        trained = StageRecord(
            index=stage.index,
            model=stage.model,
            key=stage.key,
            status="given" if stage.given else "trained",
            epochs=stage.epochs,
            steps=counters.step,
            samples_seen=counters.samples,
            params=stage.params,
            macs=stage.macs,
            wall_s=round(counters.wall_s, 3),
            gap_s=None if counters.gap_s is None else round(counters.gap_s, 3),
            first_step_s=None if counters.first_step_s is None else round(counters.first_step_s, 3),
            data_wait_s=round(counters.data_wait_s, 3),
            lr=None if stage.given else stage.lr,
            changes=[ChangeRecord(step=change.step, lr=change.lr) for change in stage.changes],
            transfer=transfer.model_dump(mode="json") if grown else None,
            checkpoint=f"stages/{stage.folder}",
            published=round(time.time(), 3),
        )
        if stage.origin:
            trained.origin = OriginRecord.of(stage.origin)
        record = self._task.suite.recorded(trained, {})
        with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
            files = write_artifact(
                Path(scratch),
                self._task.paradigm,
                found.model,
                stage.config,
                stage.size,
                projector=projector,
                moments=found.moments,
            )
            record.files = files
            (Path(scratch) / STAGE_RECORD).write_bytes(record.document())
            name = f"stages/{stage.folder}"
            patiently(lambda: self._out.publish(Path(scratch), name, STAGE_RECORD), f"{self._out.address}/{name}")
        return self._task.suite.shown(record)

    def add(self, stage: StageTask, results: Results) -> StageEntry | None:
        """Adds what was measured to the stage's record, and returns it as runs show it; None if it is not finished."""
        record, suite = self.record(stage), self._task.suite
        if record is None:
            return None
        name = f"stages/{stage.folder}/{STAGE_RECORD}"
        complete = suite.recorded(record, suite.results(record) | results)
        patiently(lambda: records.write(self._out, name, complete), f"{self._out.address}/{name}")
        return suite.shown(complete, status=stage.status)
