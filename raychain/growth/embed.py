"""`embed`: the paper's width rule."""

import torch

from raychain.growth.width import Cell, matching_positions


class Embed:
    """The small tensor at the matching positions of the large one, the rest stays randomly initialised.

    Chain-of-Models Pre-Training (arXiv 2604.12391), inverse weight initialisation. Q, K and V are axes of their own, so
    each is embedded in its own block of the fused projection. The function is not kept, so gradients are those of the
    small model only in so far as its features survive; moments are embedded like the weights.
    """

    def weight(self, cell: Cell) -> torch.Tensor:
        return matching_positions(cell, cell.init)

    def gradient(self, cell: Cell, power: int) -> torch.Tensor:  # noqa: ARG002 (the factor is 1)
        return matching_positions(cell, torch.full_like(cell.init, torch.nan))
