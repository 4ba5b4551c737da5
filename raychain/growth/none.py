"""`none`: nothing is inherited but the scalars (logit_scale); a control, for distillation alone."""

import torch

from raychain.growth.width import Cell


class Nothing:
    """The large model's random init, and moments from zero."""

    def weight(self, cell: Cell) -> torch.Tensor:
        return cell.init

    def gradient(self, cell: Cell, power: int) -> torch.Tensor:  # noqa: ARG002 (there is none)
        return torch.full_like(cell.init, torch.nan)
