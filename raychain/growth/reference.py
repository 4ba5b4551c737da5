"""`reference`: what the paper's public code does, for comparison only."""

import torch

from raychain.growth.width import Cell


class Reference:
    """The small tensor in the top-left corner of the large one, as stored.

    Every dimension counts as one block, so the fused attention projection is scrambled: a wider student's Q holds the
    teacher's Q and part of its K. Tensors of three dimensions (timm's position embedding) are left at their random
    init, as there. With `interleave` this is the public code's initialisation of ViT chains; for a Swin it has no
    depth rule.
    """

    def weight(self, cell: Cell) -> torch.Tensor:
        return self._corner(cell, cell.init)

    def gradient(self, cell: Cell, power: int) -> torch.Tensor:  # noqa: ARG002 (the factor is 1)
        return self._corner(cell, torch.full_like(cell.init, torch.nan))

    @staticmethod
    def _corner(cell: Cell, rest: torch.Tensor) -> torch.Tensor:
        grown = rest.clone().reshape(cell.large_shape)
        if grown.ndim != 3:
            corner = tuple(slice(0, min(pair)) for pair in zip(cell.small_shape, cell.large_shape, strict=True))
            grown[corner] = cell.value.reshape(cell.small_shape)[corner]
        return grown.reshape(rest.shape)
