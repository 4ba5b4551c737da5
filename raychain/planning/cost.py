"""What training a chain costs against training its models alone. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from raychain.planning.macs import Items, ModelSize, stage_macs
from raychain.planning.principles import expansion_ratio
from raychain.schema.durations import Duration


class Setting(NamedTuple):
    """What all stages share: the data of an epoch and the step."""

    samples: int
    """Samples of an epoch."""
    items: Items
    """How many inputs of each part of a model a sample has."""
    global_batch: int = 1024
    distill: bool = True
    """Whether grown stages follow a teacher, whose forward pass costs too."""
    until: Duration | None = None
    """How long they do, if not to their end."""

    def seen(self, epochs: float) -> int:
        """Samples that a stage of `epochs` sees: whole steps of the global batch, at least one, as in a run."""
        return max(1, round(epochs * self.samples / self.global_batch)) * self.global_batch

    def taught(self, seen: int) -> int:
        """Samples on which the teacher of a stage that sees so many runs; 0: all."""
        if self.until is None:
            return 0
        lengths = {"epoch_samples": self.samples, "global_batch": self.global_batch}
        steps = self.until.steps(**lengths, stage_steps=seen // self.global_batch)
        return max(1, min(steps, seen // self.global_batch)) * self.global_batch


@dataclass(frozen=True)
class StageCost:
    """One stage: its model, how long it trains, and what that costs."""

    size: ModelSize
    epochs: float
    samples: int
    """Samples seen in all epochs."""
    items: Items
    teacher: ModelSize | None
    """The model it follows; counted at this stage's image size."""
    origin: str | None = None
    """The checkpoint that it is, or starts from."""
    start: ModelSize | None = None
    """The checkpoint's model, if it starts from one in place of the stage before."""
    taught: int = 0
    """Samples on which the teacher runs; 0: all."""

    @property
    def given(self) -> bool:
        """It is a checkpoint, and not trained."""
        return self.origin is not None and self.start is None

    @property
    def forward_macs(self) -> int:
        """Forward MACs of one sample with all its inputs."""
        return self.size.forward(self.items)

    @property
    def macs(self) -> int:
        """Training MACs: 3 × forward, and the teacher's forward."""
        return stage_macs(self.size, self.teacher, self.samples, self.items, self.taught)


@dataclass(frozen=True)
class ChainCost:
    """A chain's stages and the training it is compared with."""

    stages: tuple[StageCost, ...]
    baseline: StageCost
    """The last model (or `baseline:`) trained alone."""
    alone: int
    """MACs of every model of the chain trained alone for the baseline's epochs."""

    @property
    def models(self) -> tuple[str, ...]:
        """Names in training order."""
        return tuple(stage.size.name for stage in self.stages)

    @property
    def epochs(self) -> tuple[float, ...]:
        """Epochs in training order."""
        return tuple(stage.epochs for stage in self.stages)

    @property
    def macs(self) -> int:
        """Training MACs of the whole chain."""
        return sum(stage.macs for stage in self.stages)

    @property
    def percent_of_baseline(self) -> float:
        """The chain's MACs as a percentage of the baseline's."""
        return 100 * self.macs / self.baseline.macs

    @property
    def speedup(self) -> float:
        """The baseline's MACs over the chain's."""
        return self.baseline.macs / self.macs

    @property
    def family_speedup(self) -> float:
        """Every model of the chain alone, over the chain."""
        return self.alone / self.macs

    @property
    def ratios(self) -> tuple[float, ...]:
        """Expansion ratio of every stage but the first: parameters of the principal part over those of the model that
        it grows from.
        """
        pairs = [(after.start or before.size, after.size) for before, after in itertools.pairwise(self.stages)]
        return tuple(expansion_ratio(small.principal_params, large.principal_params) for small, large in pairs)


def predict(
    sizes: Sequence[ModelSize],
    epochs: Sequence[float],
    setting: Setting,
    baseline: tuple[ModelSize, float] | None = None,
) -> ChainCost:
    """What a chain of these models, trained for these epochs in turn, costs.

    `baseline` is a model and its epochs alone; absent, the last model for the first one's epochs.
    """
    teachers = [None, *sizes[:-1]] if setting.distill else [None] * len(sizes)
    stages = tuple(
        StageCost(size, length, seen := setting.seen(length), setting.items, teacher, taught=setting.taught(seen))
        for size, length, teacher in zip(sizes, epochs, teachers, strict=True)
    )
    model, length = baseline or (sizes[-1], epochs[0])
    against = _alone(model, length, setting)
    return ChainCost(stages, against, sum(_alone(size, length, setting).macs for size in sizes))


def _alone(size: ModelSize, epochs: float, setting: Setting) -> StageCost:
    return StageCost(size, epochs, setting.seen(epochs), setting.items, None)
