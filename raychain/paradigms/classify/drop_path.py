"""Stochastic depth whose draws follow from the sample's seed and the layer alone. b samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from timm.layers import DropPath
from torch import nn

GAMMA, FIRST, SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""splitmix64's numbers as signed ones, of which torch has the arithmetic."""


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """x >> by, zeros from the left."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def uniform(seed_b: torch.Tensor, layer: int) -> torch.Tensor:
    """float64 [b] in 0 ≤ u < 1 of int64 seeds [b]: the upper 53 bits of `data.order.mix(seed, layer)`."""
    state = torch.zeros_like(seed_b)
    for value in (seed_b, torch.full_like(seed_b, layer)):
        state = state + value + GAMMA
        state = (state ^ _shifted(state, 30)) * FIRST
        state = (state ^ _shifted(state, 27)) * SECOND
        state = state ^ _shifted(state, 31)
    return _shifted(state, 11).double() * 2.0**-53


class Seeds:
    """The seeds of the samples in a forward pass, which the layers of one model share."""

    def __init__(self) -> None:
        self.seed_b: torch.Tensor | None = None

    @contextlib.contextmanager
    def of(self, seed_b: torch.Tensor) -> Iterator[None]:
        """Within, samples with these seeds are passed through the model."""
        self.seed_b = seed_b
        try:
            yield
        finally:
            self.seed_b = None


class SeededDropPath(nn.Module):
    """timm's DropPath for a residual branch [b, …], with draws that depend neither on ranks nor on micro-batches."""

    def __init__(self, probability: float, layer: int, seeds: Seeds) -> None:
        super().__init__()
        self.probability, self.layer, self.seeds = probability, layer, seeds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The branch, zero for the samples that leave it out while training."""
        if not self.training:
            return x
        assert self.seeds.seed_b is not None, "within Seeds.of"
        kept = (uniform(self.seeds.seed_b, self.layer) >= self.probability).to(x.dtype) / (1 - self.probability)
        return x * kept.view(-1, *([1] * (x.ndim - 1)))


def seed_drop_path(model: nn.Module) -> Seeds:
    """Puts seeded layers in the place of a timm model's DropPath layers; returns what they ask for seeds."""
    seeds, layer = Seeds(), 0
    for name, module in list(model.named_modules()):
        if isinstance(module, DropPath | SeededDropPath):
            parent, _, own = name.rpartition(".")
            probability = cast(Any, module).drop_prob if isinstance(module, DropPath) else module.probability
            setattr(model.get_submodule(parent), own, SeededDropPath(float(probability), layer, seeds))
            layer += 1
    return seeds
