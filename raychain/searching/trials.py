"""A trial of a search: a chain, as a path of nodes in the tree of stages. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from raychain.core.json import Json
from raychain.records import ChainedRecord, Metrics
from raychain.training.task import ChainTask, StageTask

Kind = Literal["planned", "sampled", "control", "equal-macs", "full"]
CHOSEN: tuple[Kind, ...] = ("planned", "sampled")
"""Kinds that a sampler chooses, or is given as a proposal; the others are never stopped early."""


class Step(NamedTuple):
    """A node of the tree of stages."""

    key: str
    place: int
    """Index of the stage within its chain."""
    share: float
    """Share of the stage's steps that end here."""
    stage: StageTask

    @property
    def whole(self) -> bool:
        """It ends the stage."""
        return self.key == self.stage.key


def trunk_key(trunk: str, rung: int) -> str:
    """The key of a trunk's first `rung` steps."""
    return f"{trunk}@{rung}"


@dataclass(eq=False)
class Trial:
    """One chain that is tried."""

    number: int
    kind: Kind
    params: Json
    """The sampler's choices; for other kinds, what tells it from the others."""
    task: ChainTask
    status: Literal["running", "succeeded", "failed", "stopped"] = "running"
    reason: str | None = None
    """Why it failed or was stopped before its end."""
    metrics: Metrics = field(default_factory=dict)
    reached: int | None = None
    """How many nodes of its path were there when it was stopped."""
    told: int = 0
    """How many reports it was given."""
    own: set[str] = field(default_factory=set)
    """Stages that were trained for it first."""

    @property
    def keys(self) -> list[str]:
        """Its stages."""
        return [stage.key for stage in self.task.stages]

    @property
    def name(self) -> str:
        """The key of its last stage, which stands for the whole chain."""
        return self.task.stages[-1].key

    @property
    def chosen(self) -> bool:
        """It is a chain that may be the best one, no control."""
        return self.kind in CHOSEN

    @property
    def path(self) -> list[Step]:
        """Its nodes in the tree of stages: the stages, each after the parts of its trunk."""
        found = []
        for place, stage in enumerate(self.task.stages):
            before = 0
            for rung in stage.rungs:
                found.append(Step(trunk_key(stage.trunk, rung), place, (rung - before) / stage.steps, stage))
                before = rung
            found.append(Step(stage.key, place, 1 - before / stage.steps, stage))
        return found

    @property
    def macs(self) -> int:
        """Training MACs of the whole chain, whoever trains its stages."""
        return sum(stage.macs for stage in self.task.stages)

    @property
    def chain(self) -> list[ChainedRecord]:
        """Models and epochs."""
        return [ChainedRecord(model=stage.model, epochs=stage.epochs) for stage in self.task.stages]
