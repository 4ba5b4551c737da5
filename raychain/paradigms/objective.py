"""What a stage trains: a model with its loss and the features that a larger model is to follow.

b local batch, B global batch, D features of a model, D_t those of its teacher.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from raychain.core.dist import share

Columns = Mapping[str, torch.Tensor]
"""A batch: tensors [b, …] by name; a micro-batch is a slice along dimension 0. There is always `seed`, int64 [b]: what
is drawn for a sample (masks, mixing) follows from it alone, and so does not depend on ranks or micro-batches."""


class Encoded(NamedTuple):
    """What a forward pass gives, in fp32."""

    task: tuple[torch.Tensor, ...]
    """What `Objective.loss` takes, each [b, …]: the samples' losses, or what all ranks' samples are compared by."""
    features: tuple[torch.Tensor, ...]
    """What is distilled, each [b, …, D], or [b, …, D_t] after the projector; normalised."""


PROJECTOR = "identity"
"""How projectors start; part of the key of a stage that has one."""


class Projector(nn.ModuleDict):
    """Trained linear maps from a student's features to its teacher's space, one for each feature by name.

    A map is the identity, without parameters, where both sizes agree. Else it starts as the first D_t of the D features
    ([I ‖ 0]), in which a model that was grown exactly has its teacher's: so its distance is zero at its first step.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """`sizes`: {name: (D, D_t)} in the order of `Encoded.features`."""
        super().__init__({name: _projection(*pair) for name, pair in sizes.items()})

    def forward(self, features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Features, each […, D], to normalised ones, each […, D_t]."""
        return tuple(F.normalize(layer(x), dim=-1) for layer, x in zip(self.values(), features, strict=True))


def _projection(size: int, teacher: int) -> nn.Module:
    if size == teacher:
        return nn.Identity()
    layer = nn.Linear(size, teacher, bias=False)
    nn.init.eye_(layer.weight)
    return layer


class Objective(nn.Module, ABC):
    """A model, its loss, and the projector to its teacher's features if it has a teacher. This is what DDP wraps.

    With `micro_batch` activations are held for that many samples at a time. Every part is run again when its gradient
    is due, while what the loss is made of is that of the whole batch: GradCache (Gao et al., 2021) on torch's
    activation checkpointing. A separable loss needs no second run where nothing else joins the samples
    (`training.step`).
    """

    separable: ClassVar[bool] = False
    """Whether the loss is a mean over samples: `Encoded.task` is then one tensor [b], the samples' losses."""
    feature_names: ClassVar[tuple[str, ...]] = ()
    """Names of `Encoded.features`; none: nothing can be distilled."""

    model: Any
    """What is grown, measured and published."""
    projector: Projector | None
    micro_batch: int | None = None

    def __init__(self, model: nn.Module, projector: Projector | None = None) -> None:
        super().__init__()
        self.model = model
        self.projector = projector

    @abstractmethod
    def encode(self, part: Columns) -> Encoded:
        """The forward pass of a micro-batch, without the projector. It may run twice, under autocast."""

    def features(self, part: Columns) -> tuple[torch.Tensor, ...]:
        """The teacher's side of distillation: `Encoded.features` of a micro-batch, without what only the loss needs."""
        return self.encode(part).features

    def loss(self, task: tuple[torch.Tensor, ...], batch: int) -> torch.Tensor:
        """This rank's part of the loss of a global batch of `batch` samples; the mean over ranks is the loss.

        `task` is `Encoded.task` of this rank's samples, or of a part of them if the loss is separable.
        """
        if not self.separable:
            raise TypeError(f"{type(self).__name__} compares samples with one another and has to define `loss`")
        return task[0].mean() * share(len(task[0]), batch)

    def after_step(self) -> None:
        """Called after each optimiser step, without gradients, for what must stay in bounds."""

    def report(self) -> dict[str, float]:
        """Scalars that are logged beside the losses."""
        return {}

    def forward(self, batch: Columns) -> Encoded:
        """`encode` of the whole batch, its features projected."""
        parts = split(batch, self.micro_batch)
        if len(parts) > 1 and torch.is_grad_enabled():
            encoded = [checkpoint(self.encode, part, use_reentrant=False) for part in parts]
        else:
            encoded = [self.encode(part) for part in parts]
        task, features = (_joined(tensors) for tensors in zip(*encoded, strict=True))
        return Encoded(task, self.projector(features) if self.projector is not None else features)

    @torch.no_grad()
    def teach(self, batch: Columns) -> tuple[torch.Tensor, ...]:
        """`features` of the whole batch, a micro-batch at a time."""
        return _joined([self.features(part) for part in split(batch, self.micro_batch)])


def split(batch: Columns, size: int | None) -> list[Columns]:
    """The batch in parts of at most `size` samples; itself where `size` is None."""
    samples = len(next(iter(batch.values())))
    if size is None or size >= samples:
        return [batch]
    return [{name: column[i : i + size] for name, column in batch.items()} for i in range(0, samples, size)]


def _joined(parts: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
