"""Two growth operators: small tensors between zeros, and layers that start as the identity at the top."""

import torch

from raychain.growth.depth import LayerSource
from raychain.growth.width import Cell, matching_positions


class Padded:
    """The small tensor at the matching positions of the large one, zeros elsewhere."""

    def weight(self, cell: Cell) -> torch.Tensor:
        """The large tensor, shaped like `cell.init`."""
        return matching_positions(cell, torch.zeros_like(cell.init))

    def gradient(self, cell: Cell, power: int) -> torch.Tensor:
        """The small model's gradient at the matching positions; the others are unknown."""
        return matching_positions(cell, torch.full_like(cell.init, torch.nan))


padded = Padded()


def on_top(small: int, large: int) -> list[LayerSource]:
    """The small model's layers in order, then its last one again, as identity blocks."""
    return [LayerSource(min(layer, small - 1), inert=layer >= small) for layer in range(large)]
