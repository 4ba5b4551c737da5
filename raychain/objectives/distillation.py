"""Inverse feature distillation: the larger student follows the smaller teacher's features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from raychain.objectives.contrastive import share

CAP = 0.999
"""The capped distillation loss is at most this share of the task loss, so that L_IFD < L_task holds strictly."""


class Projector(nn.Module):
    """T of the method: student features to the teacher's space, one map a tower, trained with the student.

    The identity (no parameters) where the embedding sizes agree.
    """

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        same = student_dim == teacher_dim
        self.image = nn.Identity() if same else nn.Linear(student_dim, teacher_dim, bias=False)
        self.text = nn.Identity() if same else nn.Linear(student_dim, teacher_dim, bias=False)
        for layer in (self.image, self.text):
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[…, student] features to normalised […, teacher] features."""
        return F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)


def feature_distance(
    student: tuple[torch.Tensor, torch.Tensor], teacher: tuple[torch.Tensor, torch.Tensor], batch: int | None = None
) -> torch.Tensor:
    """Mean over samples (and captions) of the squared distance of normalised features, averaged over the two towers.

    This rank's part, whose mean over ranks is the value of the global batch of `batch` samples (absent: all ranks hold
    as many). Independent of the embedding size: alpha 1.95 on it is the public code's 500 on the mean over 512
    dimensions.
    """
    towers = [(s - t).square().sum(-1).mean() for s, t in zip(student, teacher, strict=True)]
    return (towers[0] + towers[1]) / 2 * share(len(student[0]), batch)


def capped_alpha(alpha: float, distance: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
    """The largest weight up to `alpha` for which weight × distance stays below the task loss; no gradient.

    Both values must be those of the global batch, so that every rank finds the same weight.
    """
    distance, task = distance.detach().float(), task.detach().float()  # in bf16 CAP itself would round to 1
    limit = CAP * task / distance.clamp_min(torch.finfo(torch.float32).tiny)
    return limit.clamp(max=alpha)
