"""AdamW's parameter groups and a stateless learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from raychain.config.experiment import Train


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and tables with weight decay; gains, biases and logit_scale without (as open_clip)."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            (free if parameter.ndim < 2 or "logit_scale" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def make_optimizer(module: nn.Module, recipe: Train) -> torch.optim.AdamW:
    """Fused AdamW over the module's parameters."""
    groups = parameter_groups(module.named_parameters(), recipe.weight_decay)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)


def learning_rate(step: int, *, peak: float, warmup: int, total: int, schedule: str) -> float:
    """Learning rate of 0-based `step` of `total`: linear from peak/warmup to peak, then cosine to zero or constant."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
