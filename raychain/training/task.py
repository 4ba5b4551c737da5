"""What the workers are told: plain data, decided by the driver before Ray starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raychain.config.experiment import Experiment
from raychain.evaluation.data import RetrievalData, ZeroShotData
from raychain.feed.order import Order
from raychain.feed.shards import Shard


@dataclass(frozen=True)
class StageTask:
    """One stage of the chain, all durations in steps."""

    index: int
    model: str
    key: str
    """Content address: the hash of all that determines the stage's result."""
    folder: str
    """Name under `stages/` and `checkpoints/`."""
    steps: int
    warmup: int
    lr: float
    betas: tuple[float, float]
    eps: float
    precision: Literal["bf16", "fp32"]
    image_size: int
    eval_every: int
    """Steps between evaluations during the stage; 0: none."""
    epochs: float
    params: int
    macs: int
    """Training MACs of the whole stage."""
    published: bool
    """Finished already: the stage folder in the run folder holds this key."""


@dataclass(frozen=True)
class ChainTask:
    """The chain and its data."""

    experiment: Experiment
    out: str
    stages: tuple[StageTask, ...]
    shards: tuple[Shard, ...]
    order: Order
    epoch_samples: int
    zero_shot: ZeroShotData | None
    retrieval: RetrievalData | None
    evaluation: str
    """Identity of what is measured."""
    threads: int
    """Torch threads a worker."""
