"""`embed`: the paper's width rule."""

import torch

from raychain.growth.width import Cell, overlap


class Embed:
    """The small tensor at the matching positions of the large one, the rest stays randomly initialised.

    Chain-of-Models Pre-Training (arXiv 2604.12391), inverse weight initialisation. Q, K and V are axes of their own,
    so each is embedded in its own block of the fused projection.
    """

    def weight(self, cell: Cell) -> torch.Tensor:
        grown = cell.init.clone()
        region = overlap(cell.value, cell.init)
        grown[region] = cell.value[region]
        return grown
