"""The keys of stages: pure functions of all that determines a stage's result, and of nothing else.

Nothing here reads a file, a device or the environment. What a machine decides (workers, budget, cache, storage) has no
field in `Determinants`, so it cannot change a key. A new determinant joins `_content` only where it is used, so that
stages without it keep their keys; anything else is a new SCHEMA, which the changelog explains.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raychain.config.experiment import Transfer
from raychain.core.json import Json
from raychain.data.mixture import BLOCK

SCHEMA = 3
"""Version of the code's training semantics and of what its keys are made of; part of every stage key."""
FORMER_SCHEMA = 2
"""Its stages are taken over where their data is untouched (`runs.takeover`)."""


@dataclass(frozen=True)
class Determinants:
    """All that determines a stage's result but the stages before it."""

    model: Mapping[str, Any]
    """The model's configuration."""
    size: int
    """Pixels a side of the pictures it reads, tokens of the texts."""
    shards: tuple[str, ...]
    """Identities of the shards in their order."""
    weights: tuple[float, ...]
    """Weights of the sources that are mixed."""
    window: int
    """Shards that are shuffled together."""
    reading: Mapping[str, Any]
    """What else determines a batch (`Reader.identity`)."""
    global_batch: int
    steps: int
    warmup: int
    cooldown: int
    """Steps of the cool-down; 0 without one."""
    average: int
    """Steps that the averaged weights look back; 0 without an average."""
    lr: float
    schedule: str
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float | None
    precision: Literal["bf16", "fp32"]
    transfer: Transfer | None
    """How the stage starts from the one before; None for the first stage."""
    seed: int
    lanes: int = 1
    """Lanes of the data."""
    block: int = BLOCK
    """Positions of a mixture over which it keeps its shares."""
    projector: str = ""
    """How the projector of distillation starts; empty without one."""
    counts: tuple[int, ...] = ()
    """Samples of the shards, where files beside them say so and nobody has counted; else they follow from `shards`."""
    follows: int = 0
    """Steps over which distillation fades; 0 where it does not."""
    changes: tuple[tuple[int, float], ...] = ()
    """Other peak learning rates, each after the step from which it holds."""
    task: Mapping[str, Any] = field(default_factory=dict)
    """The paradigm with its options; empty for CLIP, which was the only one when keys were made first."""


def stage_key(stage: Determinants, previous: str, schema: int = SCHEMA) -> str:
    """Content address of a stage that follows the stage with the key `previous` (empty: none)."""
    own = {"steps": stage.steps, "average": stage.average} | ({"cooldown": stage.cooldown} if stage.cooldown else {})
    return _digest(_content(stage, previous, schema) | own)


def given_key(digest: str, model: Mapping[str, Any], size: int, task: Mapping[str, Any]) -> str:
    """Content address of a checkpoint that is a stage without training; `digest` is of its weights."""
    content = {"schema": SCHEMA, "given": digest, "model": model, "image_size": size}
    return _digest(content | ({"task": task} if task else {}))


def trunk_key(stage: Determinants, previous: str, schema: int = SCHEMA) -> str:
    """Content address of what precedes the stage's cool-down, whatever its length; empty without a cool-down."""
    return _digest(_content(stage, previous, schema) | {"trunk": True}) if stage.cooldown else ""


def _content(stage: Determinants, previous: str, schema: int) -> Json:
    """What stages of every length have in common."""
    content = {
        "schema": schema,
        "model": stage.model,
        "image_size": stage.size,
        "data": {
            "shards": stage.shards,
            "weights": stage.weights,
            "window": stage.window,
            **({"lanes": stage.lanes} if stage.lanes > 1 else {}),
            **({"block": stage.block} if stage.block != BLOCK else {}),
            **({"counts": stage.counts} if stage.counts else {}),
            **stage.reading,
        },
        "warmup": stage.warmup,
        "lr": stage.lr,
        "adam": [stage.betas, stage.eps],
        "precision": stage.precision,
        "recipe": {
            "global_batch": stage.global_batch,
            "schedule": stage.schedule,
            "weight_decay": stage.weight_decay,
            "clip_norm": stage.clip_norm,
        },
        "transfer": _inherited(stage.transfer) if stage.transfer else None,
        "seed": stage.seed,
        "previous": previous,
    }
    content |= {"changes": stage.changes} if stage.changes else {}
    content |= {"projector": stage.projector} if stage.projector else {}
    content |= {"follows": stage.follows} if stage.follows else {}
    return content | ({"task": stage.task} if stage.task else {})


def _inherited(transfer: Transfer) -> Json:
    """The part of `transfer` that a key holds nowhere else; `shrink` came later, stages without it keep their keys."""
    found = transfer.model_dump(
        mode="json", exclude={"warmup", "lr_scale"} | ({"shrink"} if transfer.shrink == 1 else set())
    )
    if found["distill"]:
        found["distill"].pop("until")  # its steps are among the determinants
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]
