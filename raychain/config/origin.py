"""Checkpoints that one has already, as a chain's first model or as what a stage starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field

from raychain.schema.component import Component
from raychain.schema.problems import WHERE, Problem

if TYPE_CHECKING:
    from raychain.config.experiment import Stage


class Start(Component):
    """A checkpoint that a stage grows from in place of the stage before."""

    checkpoint: str = Field(min_length=1)
    """The checkpoint, in the forms of `chain.0.checkpoint`."""
    model: str = ""
    """Its model, where the checkpoint does not say it."""


AnyStart = Annotated[Start, BeforeValidator(lambda value: {"checkpoint": value} if isinstance(value, str) else value)]


def trained_whole(stage: Stage) -> list[Problem]:
    """What a stage that is trained lacks."""
    missing = [name for name in ("model", "epochs") if not getattr(stage, name)]
    return [Problem((name,), "nothing", "this key is required", f"add {WHERE}: …") for name in missing]


def given_alone(stage: Stage) -> list[Problem]:
    """What stands beside a checkpoint that is not trained."""
    fields = [name for name in type(stage).model_fields if name not in ("checkpoint", "model")]
    beside = [name for name in fields if getattr(stage, name) != type(stage).model_fields[name].default]
    allowed = "`model` alone beside `checkpoint`, which is measured and grown but not trained"
    fix = "remove {name}; to train it further, write {{model: …, start: …, epochs: …}} in place of `checkpoint`"
    return [Problem((name,), str(getattr(stage, name)), allowed, fix.format(name=name)) for name in beside]


def misplaced(chain: Sequence[Stage]) -> list[Problem]:
    """Checkpoints where there can be none, and a chain of one that leaves nothing to train."""
    found = []
    for index, stage in enumerate(chain):
        if index and stage.checkpoint is not None:
            fix = f"write `start: {stage.checkpoint}` and `epochs` in the stage that is to grow from it"
            found.append(Problem((index, "checkpoint"), stage.checkpoint, "a checkpoint as the first stage only", fix))
    if len(chain) == 1 and chain[0].checkpoint is not None:
        fix = "add a stage {model: …, epochs: …}; `raychain evaluate` measures a checkpoint"
        found.append(Problem((), f"the checkpoint {chain[0].checkpoint} alone", "at least one stage to train", fix))
    return found
