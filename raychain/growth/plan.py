"""Matching two models' parameters, and finding out before anything is written whether one can grow into the other."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

from torch import nn

from raychain.growth.depth import DepthOperator, LayerSource, layer_sources
from raychain.growth.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from raychain.growth.width import AxisGrowth, WidthOperator
from raychain.models.architectures import ModelDescription, describe
from raychain.models.architectures.model import UndescribedTower
from raychain.models.axes import Layer, Parameter, Tower, UndescribedError

Operator = TypeVar("Operator")


class GrowthError(ValueError):
    """Two models of which one cannot grow into the other, or an operator that does not exist."""


@dataclass(frozen=True)
class TowerGrowth:
    """What happened to one tower.

    `layers` maps each stack to the small layer that every large layer took over. Where the architectures differ the
    tower was left at its random init: `grown` is False, `widths` and `layers` are empty.
    """

    small: str
    large: str
    grown: bool
    widths: dict[str, tuple[int, int]]
    layers: dict[str, list[LayerSource]]


@dataclass(frozen=True)
class Match:
    """A parameter of the large model and the small one it grows from; `inert`: its block must start as the identity."""

    small: Parameter
    large: Parameter
    inert: bool

    @property
    def axes(self) -> tuple[AxisGrowth, ...]:
        return tuple(
            AxisGrowth(new.space, new.side, old.space.size)
            for old, new in zip(self.small.axes, self.large.axes, strict=True)
        )


@dataclass(frozen=True)
class GrowthPlan:
    """A checked pair of models: everything growth needs but the values."""

    operator: WidthOperator
    matches: tuple[Match, ...]
    scalars: tuple[str, ...]
    towers: dict[str, TowerGrowth]


Describe = Callable[[nn.Module], ModelDescription]
"""The axes of a model's parameters. Raises UndescribedError."""


def check(small: nn.Module, large: nn.Module, *, width: str, depth: str, describe: Describe = describe) -> None:
    """Whether `small` can grow into `large`; both may be on the meta device. `describe` tells their parameters' axes.

    Raises GrowthError naming the parameter or axis that cannot be grown: one that would shrink (only the shared
    embedding may: the overlap is kept), one without a counterpart, one that no description covers; or the operator
    that does not exist.
    """
    plan_growth(small, large, width=width, depth=depth, describe=describe)


def plan_growth(
    small: nn.Module, large: nn.Module, *, width: str, depth: str, describe: Describe = describe
) -> GrowthPlan:
    """`check`, and the plan it arrives at."""
    width_operator = _named(WIDTH_OPERATORS, "width", width)
    depth_operator = _named(DEPTH_OPERATORS, "depth", depth)
    try:
        old, new = describe(small), describe(large)
    except UndescribedError as error:
        raise GrowthError(str(error)) from error
    for name in (*old.scalars, *new.scalars):
        if name not in old.scalars or name not in new.scalars:
            raise GrowthError(f"{name} exists in only one of the two models")
    matches: list[Match] = []
    towers: dict[str, TowerGrowth] = {}
    for name, new_tower in new.towers.items():
        old_tower = old.towers[name]
        if isinstance(old_tower, Tower) and isinstance(new_tower, Tower) and old_tower.kind == new_tower.kind:
            _check_constants(old_tower, new_tower)
            sources = _layer_sources(old_tower, new_tower, depth_operator)
            matches += _match(old_tower, new_tower, sources)
            towers[name] = TowerGrowth(old_tower.kind, new_tower.kind, True, _widths(old_tower, new_tower), sources)
        else:
            _check_across(old_tower, new_tower)
            towers[name] = TowerGrowth(old_tower.kind, new_tower.kind, False, {}, {})
    return GrowthPlan(width_operator, tuple(matches), new.scalars, towers)


def _named(operators: Mapping[str, Operator], kind: str, name: str) -> Operator:
    if name not in operators:
        close = get_close_matches(name, operators, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise GrowthError(f"unknown {kind} operator {name!r}: known are {', '.join(operators)}{hint}")
    return operators[name]


def _check_across(small: Tower | UndescribedTower, large: Tower | UndescribedTower) -> None:
    """A tower between different architectures stays at its random init; an undescribed one that should grow is an
    error.
    """
    for tower in (small, large):
        if isinstance(tower, UndescribedTower) and small.kind == large.kind:
            raise GrowthError(tower.reason)


def _check_constants(small: Tower, large: Tower) -> None:
    for name, after in large.constants.items():
        if (before := small.constants.get(name)) != after:
            raise GrowthError(f"{name} is {before} in the smaller model, {after} in the larger one: weights rely on it")


def _layer_sources(small: Tower, large: Tower, operator: DepthOperator) -> dict[str, list[LayerSource]]:
    sources = {}
    for name, stack in large.stacks.items():
        if name not in small.stacks:
            raise GrowthError(f"{name}: the smaller model has no such stack of layers")
        try:
            sources[name] = layer_sources(operator, small.stacks[name].depth, stack.depth, stack.period)
        except ValueError as error:
            raise GrowthError(f"{name}: {error}") from error
    return sources


def _match(small: Tower, large: Tower, sources: Mapping[str, list[LayerSource]]) -> Iterator[Match]:
    by_place = {(parameter.key, parameter.layer): parameter for parameter in small.parameters}
    for target in large.parameters:
        layer, inert = target.layer, False
        if layer is not None:
            source = sources[layer.stack][layer.index]
            layer, inert = Layer(layer.stack, source.layer), source.inert
        found = by_place.get((target.key, layer))
        if found is None:
            raise GrowthError(f"parameter {target.name} has no counterpart in the smaller model")
        _check_sizes(found, target)
        yield Match(found, target, inert)
    keys = {parameter.key for parameter in large.parameters}
    for parameter in small.parameters:
        if parameter.key not in keys:
            raise GrowthError(f"parameter {parameter.name} of the smaller model has no counterpart in the larger one")


def _check_sizes(small: Parameter, large: Parameter) -> None:
    for old, new in zip(small.axes, large.axes, strict=True):
        before, after, kind = old.space.size, new.space.size, new.space.kind
        where = f"parameter {large.name}, axis {new.space.name}"
        if kind == "fixed" and before != after:
            raise GrowthError(
                f"{where}: {before} in the smaller model, {after} in the larger one; this axis cannot grow"
            )
        if kind in ("stream", "units") and after < before:
            raise GrowthError(f"{where}: {after} is narrower than the {before} of the model it should grow from")


def _widths(small: Tower, large: Tower) -> dict[str, tuple[int, int]]:
    return {
        name: (small.spaces[name].size, space.size)
        for name, space in large.spaces.items()
        if space.kind != "fixed" and name in small.spaces
    }
