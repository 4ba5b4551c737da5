"""Hours and memory of a chain: estimates from a rate and from counted tensors. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from raychain.planning.cost import ChainCost, StageCost
from raychain.planning.macs import Items, ModelSize
from raychain.records import StageEntry

FLOPS_A_MAC = 2


@dataclass(frozen=True)
class Peak:
    """A rate from the accelerator's peak: dense TFLOP/s of one, the share of it that training reaches, how many."""

    tflops: float
    mfu: float
    workers: int

    def seconds(self, stage: StageCost) -> float:
        """FLOPs (two a MAC) over the rate of all workers together."""
        return FLOPS_A_MAC * stage.macs / (self.tflops * 1e12 * self.mfu * self.workers)


@dataclass(frozen=True)
class Throughput:
    """Samples a second over all workers, by model."""

    samples_per_s: Mapping[str, float]

    def seconds(self, stage: StageCost) -> float:
        """Samples seen over the model's rate."""
        return stage.samples / self.samples_per_s[stage.size.name]


class Measured(NamedTuple):
    """Rates of finished stages: samples a second by model, and MACs a second for models that were not among them."""

    samples_per_s: Mapping[str, float]
    macs_per_s: float

    def seconds(self, stage: StageCost) -> float:
        """The model's own rate where it was measured, else by MACs (small models reach fewer of these a second)."""
        if rate := self.samples_per_s.get(stage.size.name):
            return stage.samples / rate
        return stage.macs / self.macs_per_s


Rate = Peak | Throughput | Measured


def hours(cost: ChainCost, rate: Rate) -> list[float]:
    """Hours of each stage's training steps. Evaluation, start-up and waiting for data are not in them."""
    return [rate.seconds(stage) / 3600 for stage in cost.stages]


def measured_rate(stages: Sequence[StageEntry]) -> Measured | None:
    """Rates of the trained stages of a run.json; None if there are none.

    A stage that a run continued or reused has the seconds of its own training; stages without are left out.
    """
    rates: dict[str, float] = {}
    macs = seconds = 0.0
    for stage in stages:
        wall, seen, cost = stage.wall_s, stage.samples_seen, stage.macs
        if wall and seen and cost and stage.status in ("trained", "reused"):
            rates[str(stage.model)] = seen / wall
            macs, seconds = macs + cost, seconds + wall
    return Measured(rates, macs / seconds) if rates else None


def memory_bytes(
    student: ModelSize,
    teacher: ModelSize | None,
    *,
    batch: int,
    items: Items,
    precision: Literal["bf16", "fp32"],
    average: bool,
) -> int:
    """Bytes that training needs on one worker with `batch` samples at a time, each with so many inputs of each part.

    weights, gradients, AdamW's two moments (fp32)      16 bytes a parameter
    averaged weights (fp32)                              4 bytes a parameter, with `average`
    bf16 copies of the weights, which autocast keeps     2 bytes a parameter, with bf16
    teacher's weights (fp32), and its bf16 copies        4 (6) bytes a parameter
    what the forward pass keeps for the backward pass    values of all samples × 2 (bf16) or 4 bytes

    The last are counted tensor by tensor (`ModelSize.kept`), without attention matrices. The CUDA context, NCCL's
    buffers, the losses' and the allocator's slack are not in it: leave some gigabytes free.
    """
    half = precision == "bf16"
    weights = student.params * (16 + 4 * average + 2 * half)
    followed = teacher.params * (4 + 2 * half) if teacher else 0
    return weights + followed + batch * student.kept(items) * (2 if half else 4)
