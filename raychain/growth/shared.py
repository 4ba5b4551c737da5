"""How function-preserving operators change the shared embedding's size, the one axis that may also shrink."""

import torch

from raychain.growth.width import Cell

IMAGE_SCALE = 1e-3


def start_new_dimensions(cell: Cell, grown: torch.Tensor) -> torch.Tensor:
    """`grown` (complete and large) with its new dimensions of the shared embedding set to what they should start from.

    That is zero in the text tower, and 1e-3 of their random init in the image tower: dot products are kept exactly,
    cosines to about 1e-6, and the new dimensions learn. Zero in both towers would be a saddle, as each tower's gradient
    there is a multiple of the other's value.
    """
    scale = IMAGE_SCALE if cell.parameter.key.startswith("visual.") else 0.0
    for dim, axis in enumerate(cell.axes):
        if axis.kind == "shared" and axis.grows:
            added = (slice(None),) * dim + (slice(axis.small, None),)
            grown[added] = cell.init[added] * scale
    return grown
