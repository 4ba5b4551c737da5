"""`duplicate`: units repeated, what they send on divided among the copies."""

import torch

from raychain.growth.shared import start_new_dimensions
from raychain.growth.width import AxisGrowth, Cell


class Duplicate:
    """Coordinate j of a wider axis is a copy of the small model's j mod w; a matrix that reads it takes its share of 1.

    Net2Net, bert2BERT's FPI and HyperCloning. The function is kept exactly where every width is a multiple of the
    small one; otherwise LayerNorms weigh the coordinates that have more copies more (LEMON meets the same). Copies
    that stay equal learn nothing new: with `uneven` > 0 the shares differ from 1/k by up to that fraction,
    differently for every reader (LEMON's unequal fan-out), which keeps the function and breaks the symmetry. The
    differences are taken from the large model's random init, so they follow its seed.

    A head that is the token table itself reads its copies in full, so the norm before it returns each copy's share
    (`Parameter.before_tied`).

    The shared embedding grows as `start_new_dimensions` says: copies there would change cosines.
    """

    def __init__(self, uneven: float = 0.0) -> None:
        self.uneven = uneven

    def weight(self, cell: Cell) -> torch.Tensor:
        grown = self._copied(cell)
        for dim, axis in enumerate(cell.axes):
            if axis.side == "in" and axis.grows:
                grown = grown * self._shares(cell, dim, axis)
            elif cell.parameter.before_tied and axis.kind == "stream":
                grown = grown / _along(dim, grown.ndim, _copies(axis, grown.device))
        return start_new_dimensions(cell, grown)

    def gradient(self, cell: Cell, power: int) -> torch.Tensor:
        """A unit's copies split its gradient: what produces them gets 1/k each, what reads them all of it.

        With uneven shares this is the mean over readers.
        """
        grown = self._copied(cell)
        for dim, axis in enumerate(cell.axes):
            if cell.parameter.before_tied and axis.kind == "stream":
                continue  # every copy meets all of the head's gradient
            if axis.side != "in" and axis.kind != "shared":
                grown = grown / _along(dim, grown.ndim, _copies(axis, grown.device)) ** power
            elif axis.kind == "shared" and axis.grows:
                grown.narrow(dim, axis.small, axis.large - axis.small).fill_(torch.nan)
        return grown

    @staticmethod
    def _copied(cell: Cell) -> torch.Tensor:
        grown = cell.value
        for dim, axis in enumerate(cell.axes):
            grown = grown.index_select(dim, _sources(axis, grown.device))
        return grown

    def _shares(self, cell: Cell, dim: int, axis: AxisGrowth) -> torch.Tensor:
        sources, copies = _sources(axis, cell.init.device), _copies(axis, cell.init.device)
        even = 1 / _along(dim, cell.init.ndim, copies)
        if not self.uneven:
            return even
        noise = torch.tanh(cell.init / cell.init.std().clamp_min(1e-30))
        totals = torch.zeros_like(noise.narrow(dim, 0, axis.small)).index_add_(dim, sources, noise)
        noise = noise - totals.index_select(dim, sources) * even
        return even * (1 + self.uneven * noise / 2)


def _sources(axis: AxisGrowth, device: torch.device) -> torch.Tensor:
    return torch.arange(axis.large, device=device) % axis.small


def _copies(axis: AxisGrowth, device: torch.device) -> torch.Tensor:
    """How many copies each large coordinate's source has, float64 [large]."""
    sources = _sources(axis, device)
    return torch.bincount(sources, minlength=axis.small)[sources].double()


def _along(dim: int, ndim: int, vector: torch.Tensor) -> torch.Tensor:
    return vector.reshape([-1 if index == dim else 1 for index in range(ndim)])
