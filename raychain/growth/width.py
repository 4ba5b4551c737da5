"""What a width operator is: a rule for one parameter, given its axes, its small value and the large model's random
one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from raychain.models.axes import Parameter, Side, Space, SpaceKind


class AxisGrowth(NamedTuple):
    """One axis of a parameter: `small` coordinates become `space.size` (fewer only where the kind is `shared`)."""

    space: Space
    side: Side
    small: int

    @property
    def large(self) -> int:
        return self.space.size

    @property
    def kind(self) -> SpaceKind:
        return self.space.kind

    @property
    def grows(self) -> bool:
        return self.large > self.small


@dataclass(frozen=True)
class Cell:
    """One parameter to grow.

    value: the small model's tensor (or an optimiser moment of it); init: the large model's random one. Both are
    float64 and split into the axes: dimension i is `axes[i]`. `lookup` returns another of the small model's
    parameters by its key, from the same layer, likewise split. `small_shape` and `large_shape` are the shapes the
    models keep the tensors in.
    """

    parameter: Parameter
    axes: tuple[AxisGrowth, ...]
    value: torch.Tensor
    init: torch.Tensor
    small_shape: tuple[int, ...]
    large_shape: tuple[int, ...]
    lookup: Callable[[str], torch.Tensor]

    @property
    def region(self) -> tuple[slice, ...]:
        """The indices both tensors have, at matching positions."""
        return tuple(slice(0, min(axis.small, axis.large)) for axis in self.axes)


class WidthOperator(Protocol):
    """A rule that writes a parameter of the large model, and the moments that its optimiser should start from."""

    def weight(self, cell: Cell) -> torch.Tensor:
        """The large tensor, shaped like `cell.init`."""
        ...

    def gradient(self, cell: Cell, power: int) -> torch.Tensor:
        """The large model's gradient, given the small one's in `cell.value`, shaped like `cell.init`.

        With `power` 2 the values are squared gradients. NaN where the small model does not determine the gradient.
        """
        ...


def matching_positions(cell: Cell, rest: torch.Tensor) -> torch.Tensor:
    """The small tensor at the matching positions, `rest` (shaped like the large one) elsewhere."""
    grown = rest.clone()
    grown[cell.region] = cell.value[cell.region]
    return grown
