"""Growing a model: writing the large model's parameters from the small one's."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from raychain.core.json import Json
from raychain.growth.plan import Describe, GrowthPlan, Match, TowerGrowth, plan_growth
from raychain.growth.width import Cell
from raychain.models.architectures import describe
from raychain.models.axes import Layer, Parameter


@dataclass(frozen=True)
class GrowthReport:
    """What a growth step wrote: `inherited` of the large model's `total` parameter tensors took values from the small
    one.
    """

    width: str
    depth: str
    inherited: int
    total: int
    towers: dict[str, TowerGrowth]

    def as_dict(self) -> Json:
        """The report in JSON's types; `identity` lists the layers that start as identity blocks."""
        towers = {
            name: {
                "from": tower.small,
                "to": tower.large,
                "grown": tower.grown,
                "widths": {space: list(sizes) for space, sizes in tower.widths.items()},
                "layers": {stack: [source.layer for source in sources] for stack, sources in tower.layers.items()},
                "identity": {
                    stack: [index for index, source in enumerate(sources) if source.inert]
                    for stack, sources in tower.layers.items()
                },
            }
            for name, tower in self.towers.items()
        }
        counts = {"inherited": self.inherited, "total": self.total}
        return {"width": self.width, "depth": self.depth, **counts, "towers": towers}


def grow(
    small: nn.Module,
    large: nn.Module,
    *,
    width: str,
    depth: str,
    shrink: float = 1.0,
    describe: Describe = describe,
) -> GrowthReport:
    """Writes `large`'s parameters in place, from `small`'s and its own random ones.

    The result has `large`'s dtype and device. `describe` tells the axes of both models' parameters. `width` and `depth`
    name operators of WIDTH_OPERATORS and DEPTH_OPERATORS. Towers of different architectures (a ViT and a Swin) stay
    at their random init, which the report says.

    `shrink` (0 to 1) is the share of the grown parameters in the result, the rest is the random init: shrink and
    perturb (Ash and Adams, "On Warm-Starting Neural Network Training", 2020), with the init itself as the noise. Below
    1 no operator preserves the function. Scalars (logit_scale) are taken over as they are.

    Raises GrowthError as `check` does, before anything is written.
    """
    plan = plan_growth(small, large, width=width, depth=depth, describe=describe)
    sources, targets = small.state_dict(), large.state_dict()
    with torch.no_grad():
        for match, cell in cells(plan, sources, sources, targets):
            grown = plan.operator.weight(cell)
            if match.inert and match.large.closes_branch:
                grown = torch.zeros_like(grown)
            if shrink < 1:
                grown = shrink * grown + (1 - shrink) * cell.init
            targets[match.large.name].copy_(grown.reshape(cell.large_shape))
        for name in plan.scalars:
            targets[name].copy_(sources[name].reshape(targets[name].shape))
    return GrowthReport(
        width=width,
        depth=depth,
        inherited=len(plan.matches) + len(plan.scalars),
        total=len(targets),
        towers=plan.towers,
    )


def cells(
    plan: GrowthPlan,
    sources: Mapping[str, torch.Tensor],
    small: Mapping[str, torch.Tensor],
    large: Mapping[str, torch.Tensor],
) -> Iterator[tuple[Match, Cell]]:
    """Every match with what its operator needs, on the large tensor's device, in its precision or float32 if that is
    more.

    `small` and `large` are the models' tensors; `sources` holds what should grow, under the small model's names:
    `small` itself or the moments of some of its parameters (the others are passed over).
    """
    by_place = {(match.small.key, match.small.layer): match.small for match in plan.matches}

    def split(tensor: torch.Tensor, parameter: Parameter, target: torch.Tensor, copy: bool = False) -> torch.Tensor:
        dtype = torch.promote_types(target.dtype, torch.float32)
        return tensor.to(target.device, dtype, copy=copy).reshape(parameter.shape)

    for match in plan.matches:
        if match.small.name not in sources:
            continue
        target, layer = large[match.large.name], match.small.layer

        def lookup(key: str, layer: Layer | None = layer, target: torch.Tensor = target) -> torch.Tensor:
            parameter = by_place[key, layer]
            return split(small[parameter.name], parameter, target)

        cell = Cell(
            parameter=match.large,
            axes=match.axes,
            value=split(sources[match.small.name], match.small, target),
            init=split(target, match.large, target, copy=True),
            small_shape=tuple(small[match.small.name].shape),
            large_shape=tuple(target.shape),
            lookup=lookup,
        )
        yield match, cell
