"""Growing AdamW's moments: a grown model's first steps use what the small model's optimiser knew.

Moments are averages of gradients, and gradients do not grow like weights: where a function-preserving operator
multiplies a weight by c, the gradient there is divided by c. Every width operator states its rule
(`WidthOperator.gradient`); second moments follow by the square.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from raychain.growth.engine import cells
from raychain.growth.plan import Describe, plan_growth
from raychain.models.architectures import describe


@dataclass(frozen=True)
class Moments:
    """AdamW's state of a model: steps taken, and both moments by parameter name (shaped like the parameters)."""

    step: int
    exp_avg: Mapping[str, torch.Tensor]
    exp_avg_sq: Mapping[str, torch.Tensor]


def read_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
    """The moments an Adam-type optimiser holds for `model`'s parameters (those it has stepped), as references."""
    states = {
        name: optimizer.state[parameter]
        for name, parameter in model.named_parameters()
        if "exp_avg" in optimizer.state.get(parameter, {})
    }
    return Moments(
        step=max((int(state["step"]) for state in states.values()), default=0),
        exp_avg={name: state["exp_avg"] for name, state in states.items()},
        exp_avg_sq={name: state["exp_avg_sq"] for name, state in states.items()},
    )


def write_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """Gives the optimiser `moments` for `model`'s parameters; a parameter without any starts from zero at its first
    step.
    """
    for name, parameter in model.named_parameters():
        if name in moments.exp_avg:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(moments.step), device=_step_device(parameter, optimizer)),
                "exp_avg": moments.exp_avg[name].to(parameter, copy=True),
                "exp_avg_sq": moments.exp_avg_sq[name].to(parameter, copy=True),
            }


def grow_moments(
    small: nn.Module,
    large: nn.Module,
    moments: Moments,
    *,
    width: str,
    depth: str,
    describe: Describe = describe,
) -> Moments:
    """The moments the large model's optimiser starts from, given the small model's (before or after `grow`).

    Entries that the small model does not determine (new units, new stream coordinates) get a zero first moment and
    the tensor's mean second moment (zero if none of it is determined), and so does all of an identity block, but for
    its own second moments. Layers copied more than once take their source's moments each. Scalars keep theirs.
    Parameters of towers that did not grow have none.

    Result: the large model's shapes and dtypes, on its device. Raises GrowthError as `check` does.
    """
    plan = plan_growth(small, large, width=width, depth=depth, describe=describe)
    tensors, targets = small.state_dict(), large.state_dict()
    first: dict[str, torch.Tensor] = {}
    second: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for match, cell in cells(plan, moments.exp_avg, tensors, targets):
            grown = plan.operator.gradient(cell, power=1).nan_to_num(nan=0.0)
            first[match.large.name] = _like(
                torch.zeros_like(grown) if match.inert else grown, targets[match.large.name]
            )
        for match, cell in cells(plan, moments.exp_avg_sq, tensors, targets):
            grown = plan.operator.gradient(cell, power=2)
            grown = torch.where(grown.isnan(), grown.nanmean(), grown).nan_to_num(nan=0.0)
            second[match.large.name] = _like(grown, targets[match.large.name])
    for name in plan.scalars:
        if name in moments.exp_avg:
            first[name] = _like(moments.exp_avg[name], targets[name])
            second[name] = _like(moments.exp_avg_sq[name], targets[name])
    return Moments(moments.step, first, second)


def _like(tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(target.shape).to(target)


def _step_device(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> torch.device:
    """Where torch keeps a parameter's step: with it for fused and capturable optimisers, on the CPU otherwise."""
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return parameter.device if beside else torch.device("cpu")
