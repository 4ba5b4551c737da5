"""AdamW's parameter groups and a stateless learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and tables with weight decay; gains, biases and scalars without (as open_clip)."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for _, parameter in named:
        if parameter.requires_grad:
            (free if parameter.ndim < 2 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def make_optimizer(
    module: nn.Module, *, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """Fused AdamW over the module's parameters; the loop sets the learning rate before every step."""
    groups = parameter_groups(module.named_parameters(), weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


def learning_rate(step: int, *, peak: float, warmup: int, total: int, schedule: str, cooldown: int = 0) -> float:
    """Learning rate of 0-based `step` of `total`: linear from peak/warmup to peak, then cosine to zero, constant, or
    (wsd) constant until the last `cooldown` steps, which fall to zero as 1 - sqrt (Hägele et al. 2024, 2405.18392).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        return peak * (1 - math.sqrt(max(0, step - (total - cooldown) + 1) / (cooldown + 1)))
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
