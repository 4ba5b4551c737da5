"""What the workers are told: plain data, decided by the driver before Ray starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

from raychain.config.experiment import Distill, Experiment
from raychain.data.loader import Feed
from raychain.data.shards import Shard
from raychain.errors import without_secrets
from raychain.evaluators.suite import Suite
from raychain.paradigms import make_paradigm
from raychain.paradigms.base import Config, Paradigm
from raychain.records import StageEntry


class Before(NamedTuple):
    """The stage before."""

    key: str
    former: str
    """Key of schema 2."""
    folder: str
    """The stage's folder, as in `StageTask.folder`."""


@dataclass(frozen=True)
class Former:
    """What schema 2 called a stage, and what tells whether a stage of that name is still the one that is wanted."""

    key: str
    begun: str
    """Key of its unfinished states, which knew no change of the learning rate."""
    before: Before | None
    pixels: str
    """How pictures were kept, which followed from `preload.budget`."""
    shard: str
    """The shard that was touched last, of those that the chain reads up to the stage's end; empty without data."""
    changed: float
    """When that was, seconds since 1970."""


@dataclass(frozen=True)
class RateChange:
    """Another peak learning rate from some step of a stage on."""

    step: int
    """Steps that are done before."""
    lr: float
    key: str
    """Content address of the stage without this change and those after it."""
    trunk: str
    """The same of what comes before that stage's cool-down; empty without one."""


class Given(NamedTuple):
    """A checkpoint that one has already, which is a stage without steps."""

    checkpoint: str
    """Its address, as the experiment has it."""
    digest: str
    """Hash of its content."""
    where: str
    """The option that names it."""
    moments: bool
    """It has AdamW's moments, and they are grown."""


@dataclass(frozen=True)
class StageTask:
    """One stage of the chain, all durations in steps."""

    index: int
    model: str
    config: Config
    """The model's configuration."""
    size: int
    """Pixels a side of the pictures it reads, tokens of the texts."""
    key: str
    """Content address: the hash of all that determines the stage's result."""
    former: Former
    folder: str
    """Name under `stages/` and `checkpoints/`."""
    steps: int
    warmup: int
    lr: float
    betas: tuple[float, float]
    eps: float
    precision: Literal["bf16", "fp32"]
    average: int
    """Optimiser steps that the averaged weights look back; 0: no average."""
    cooldown: int
    """Steps of the cool-down of `schedule: wsd`; 0 with the others."""
    trunk: str
    """Content address of what comes before the cool-down, whatever the stage's length; empty without one."""
    rungs: tuple[int, ...]
    """Steps of the trunk, rising, whose states are shared with stages of other lengths."""
    feed: Feed
    """What it reads, in which order and resolution."""
    epoch_samples: int
    """Samples of one epoch."""
    eval_every: int
    """Steps between evaluations during the stage; 0: none."""
    epochs: float
    params: int
    macs: int
    """Training MACs of the whole stage."""
    published: bool
    """Finished already: the stage folder in the run folder holds this key."""
    changes: tuple[RateChange, ...] = ()
    """Other peak learning rates, by rising step."""
    tokens: int = 0
    """Tokens of a sample; 0 where samples are no text."""
    follows: int = 0
    """Steps after which it no longer follows a teacher (`distill.until`); 0: it does to the end, if it has one."""
    given: Given | None = None
    """The checkpoint that the stage is, if it is not trained."""
    start: StageTask | None = None
    """A checkpoint that it grows from in place of the stage before."""

    def peak(self, step: int) -> float:
        """Peak learning rate of the update after `step` steps."""
        return next((change.lr for change in reversed(self.changes) if step >= change.step), self.lr)

    def distilled(self, step: int, distill: Distill | None) -> Distill | None:
        """How the update after `step` steps follows the teacher, out of the experiment's `distill`; None: not."""
        if distill is None or not self.follows:
            return distill
        left = 1 - step / self.follows
        return distill.model_copy(update={"alpha": distill.alpha * left}) if left > 0 else None

    def key_at(self, step: int) -> str:
        """Content address of the state after `step` steps, which later changes have no part in."""
        return next((change.key for change in self.changes if step <= change.step), self.key)

    @property
    def origin(self) -> dict[str, str] | None:
        """What a record says of the checkpoint that the stage is, or that it starts from."""
        source = self.start or self
        if source.given is None:
            return None
        return {
            "checkpoint": without_secrets(source.given.checkpoint),
            "model": source.model,
            "digest": source.given.digest,
        }

    @property
    def status(self) -> str:
        """What a record says of the stage once it is finished."""
        return "given" if self.given else "reused" if self.published else "trained"

    @property
    def averaged_from(self) -> int:
        """Step at which the average of the weights begins."""
        return self.steps - self.cooldown if self.cooldown else 0


@dataclass(frozen=True)
class ChainTask:
    """The chain and its data."""

    experiment: Experiment
    out: str
    store: str | None
    """Storage whose finished stages are shared with other run folders (`runs.store`); None: only the run folder's."""
    stages: tuple[StageTask, ...]
    suite: Suite
    """What every stage is measured on."""
    threads: int
    """Torch threads a worker."""

    @property
    def paradigm(self) -> Paradigm:
        """What the chain learns."""
        return make_paradigm(self.experiment.task)

    def before(self, stage: StageTask) -> StageTask | None:
        """What a stage grows from; None where it starts at random."""
        return stage.start or (self.stages[stage.index - 1] if stage.index else None)

    def measured(self, record: StageEntry) -> bool:
        """Whether a stage's record has the metrics this chain asks for."""
        return not self.suite.missing(record)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The training shards of all stages, each once."""
        return tuple({shard.identity: shard for stage in self.stages for shard in stage.feed.shards}.values())


def worker_cpus(experiment: Experiment) -> float:
    """CPUs of a worker: as configured, else this machine's cores shared out among the workers."""
    given = experiment.compute.cpus_per_worker
    return given if given is not None else max(1, (os.cpu_count() or 1) // experiment.most_workers)
