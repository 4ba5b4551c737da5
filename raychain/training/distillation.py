"""Inverse feature distillation: the larger student follows the smaller teacher's features."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raychain.core.dist import share

CAP = 0.999
"""The capped distillation loss is at most this share of the task loss, so that L_IFD < L_task holds strictly."""


def feature_distance(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], batch: int | None = None
) -> torch.Tensor:
    """Mean over samples (and captions or tokens) of the squared distance of normalised features, each [b, …, D_t],
    averaged over the features (CLIP: the two towers).

    This rank's part, whose mean over ranks is the value of the global batch of `batch` samples (absent: all ranks hold
    as many). Independent of the embedding size: alpha 1.95 on it is the public code's 500 on the mean over 512
    dimensions.
    """
    means = [(s - t).square().sum(-1).mean() for s, t in zip(student, teacher, strict=True)]
    return torch.stack(means).mean() * share(len(student[0]), batch)


def capped_alpha(alpha: float, distance: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
    """The largest weight up to `alpha` for which weight × distance stays below the task loss; no gradient.

    Both values must be those of the global batch, so that every rank finds the same weight.
    """
    distance, task = distance.detach().float(), task.detach().float()  # in bf16 CAP itself would round to 1
    limit = CAP * task / distance.clamp_min(torch.finfo(torch.float32).tiny)
    return limit.clamp(max=alpha)
