"""What a width operator is: a rule for one parameter, given its axes, its small value and the large model's random
one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from raychain.families.axes import Parameter, Side, SpaceKind


class AxisGrowth(NamedTuple):
    """One axis of a parameter: `small` coordinates become `large` (fewer only where the kind is `shared`)."""

    space: str
    kind: SpaceKind
    side: Side
    small: int
    large: int


@dataclass(frozen=True)
class Cell:
    """One parameter to grow.

    value: the small model's tensor, init: the large model's random one, both float64 and split into the axes
    (`axes[i]` is dimension i). `lookup` returns another small parameter of the same layer by its key, likewise split.
    """

    parameter: Parameter
    axes: tuple[AxisGrowth, ...]
    value: torch.Tensor
    init: torch.Tensor
    lookup: Callable[[str], torch.Tensor]


class WidthOperator(Protocol):
    """A rule that writes a parameter of the large model."""

    def weight(self, cell: Cell) -> torch.Tensor:
        """The large tensor, shaped like `cell.init`."""
        ...


def overlap(small: torch.Tensor, large: torch.Tensor) -> tuple[slice, ...]:
    """The index region both shapes have, at matching positions."""
    return tuple(slice(0, min(pair)) for pair in zip(small.shape, large.shape, strict=True))


SpaceSizes = Mapping[str, tuple[int, int]]
