"""The exponential moving average of a stage's weights: what is measured, published and grown."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def make_average(model: nn.Module, steps: int, *, trained: bool) -> AveragedModel:
    """The average over about the last `steps` optimiser steps; call `update_parameters(model)` after each.

    It starts from the model's weights at the time of the call. Where these are `trained`, as after growth, the decay is
    1 - 1/steps at once: while the learning rate rises and the weights leave the small model's minimum, their average
    stays near it and improves. Otherwise the decay is reached as (1 + n) / (10 + n) after n updates, so that a random
    start is soon forgotten.
    """
    decay = 1 - 1 / max(steps, 1)

    @torch.no_grad()
    def follow(average: Any, current: Any, _: Any) -> None:
        n = int(averaged.n_averaged) - 1  # the buffer on the CPU; the argument may lie on the GPU, where reading waits
        torch._foreach_lerp_(average, current, 1 - (decay if trained else min(decay, (1 + n) / (10 + n))))

    averaged = AveragedModel(model, multi_avg_fn=follow)
    averaged.update_parameters(model)  # the first call copies
    return averaged.eval().requires_grad_(False)
