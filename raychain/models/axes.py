"""Parameters described by their axes, so that one growth rule per axis serves every architecture.

A tensor dimension is a product of *axes*, written in a pattern: `(qkv >heads dim) <embed` is the fused attention
projection, whose rows are 3 × heads × head_dim and whose columns are the residual stream. Each axis belongs to a
*space* of its tower; all parameters that share a space grow together. The mark before an axis says how the parameter
uses it:

    >  produces it (the output side of a matrix, an embedding, a bias)
    <  consumes it (the input side, summed over)
       (no mark) acts on it elementwise, or merely indexes it (gains, layer scale, heads of a fused projection's `qkv`)
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch

SpaceKind = Literal["stream", "units", "shared", "fixed"]
Side = Literal["out", "in", "through"]
Role = Literal["weight", "bias", "gain", "shift", "scale", "scalar"]

_SIDES: dict[str, Side] = {">": "out", "<": "in", "": "through"}


class UndescribedError(ValueError):
    """A parameter that no description covers, or one whose shape contradicts its description.

    `kind` is the architecture whose description it is.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Space:
    """A set of coordinates that grow together.

    kind: `stream`, the residual stream (read through LayerNorms or RMSNorms only); `units`, attention heads, MLP units;
    `shared`, the embedding both towers project to; `fixed`, sizes that no operator changes (vocabulary, positions,
    head_dim). gain: the key of a LayerNorm's weight, for a stream that this LayerNorm turns into the residual stream
    (CLIP's ln_pre). centred: for a stream, whether what reads it subtracts its mean first (LayerNorm) or not (RMSNorm).
    """

    name: str
    size: int
    kind: SpaceKind
    gain: str | None = None
    centred: bool = True


@dataclass(frozen=True)
class Axis:
    """One factor of a tensor dimension: a space and how the parameter uses it."""

    space: Space
    side: Side


@dataclass(frozen=True)
class Layer:
    """A place in a stack of residual layers."""

    stack: str
    index: int


@dataclass(frozen=True)
class Parameter:
    """A named tensor and its axes.

    `name` is the key in the model's state dict; `key` the name that parameters of the same meaning share across
    layouts (CLIP and CustomTextCLIP), with the layer's index left out. `closes_branch` marks the weight and bias that
    end a residual branch: a block whose closing parameters are zero is the identity. `scaled_by` is the key of the
    layer scale that multiplies what the parameter writes. `before_tied` marks gain and shift of the norm whose output a
    head reads that is the token table itself.
    """

    name: str
    key: str
    axes: tuple[Axis, ...]
    role: Role
    layer: Layer | None = None
    closes_branch: bool = False
    scaled_by: str | None = None
    before_tied: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape with every composite dimension split into its axes."""
        return tuple(axis.space.size for axis in self.axes)


@dataclass(frozen=True)
class Stack:
    """A run of residual layers; layer i may take the place of layer j only if they agree modulo `period`."""

    name: str
    depth: int
    period: int = 1


@dataclass(frozen=True)
class Tower:
    """One tower's parameters. Towers of the same `kind` grow into each other.

    `constants` are numbers of the architecture that are no parameters and on which its function depends: a tower grows
    only into one with the same.
    """

    name: str
    kind: str
    spaces: Mapping[str, Space]
    stacks: Mapping[str, Stack]
    parameters: tuple[Parameter, ...]
    constants: Mapping[str, object] = field(default_factory=dict)


@dataclass
class TowerBuilder:
    """Collects a tower's description, checking every pattern against the tensor it describes.

    `tensors` maps names, relative to the tower, to tensors of any device (meta included); `prefix` turns them into
    names of the model's state dict. Where descriptions are written for a wrapper around the model, `wrapper` is what
    its names begin with there (timm's models in open_clip: `trunk.`).
    """

    name: str
    kind: str
    prefix: str
    tensors: Mapping[str, torch.Tensor]
    wrapper: str = ""
    spaces: dict[str, Space] = field(default_factory=dict)
    stacks: dict[str, Stack] = field(default_factory=dict)
    parameters: list[Parameter] = field(default_factory=list)
    constants: dict[str, object] = field(default_factory=dict)

    def space(self, name: str, size: int, kind: SpaceKind, gain: str | None = None, *, centred: bool = True) -> None:
        """Declares a space that patterns can use by its name; `gain` names the tensor of `Space.gain`."""
        self.spaces[name] = Space(f"{self.name}.{name}", size, kind, f"{self.name}.{gain}" if gain else None, centred)

    def stack(self, name: str, depth: int, period: int = 1) -> None:
        """Declares a stack of layers."""
        self.stacks[name] = Stack(f"{self.name}.{name}", depth, period)

    def add(
        self,
        name: str,
        pattern: str,
        role: Role,
        *,
        layer: tuple[str, int] | None = None,
        closes: bool = False,
        scaled_by: str | None = None,
        before_tied: bool = False,
    ) -> None:
        """Describes the tensor `name`; a `{}` in it stands for the layer's index. Absent tensors are passed over.

        Raises UndescribedError where the tensor's shape is not the pattern's.
        """
        full = name.format(layer[1]) if layer else name
        if full not in self.tensors:
            return
        groups = list(_groups(pattern))
        shape = tuple(prod(self.spaces[axis].size for _, axis in group) for group in groups)
        if shape != tuple(self.tensors[full].shape):
            raise UndescribedError(
                self.kind,
                f"{self._full(full)} has shape {tuple(self.tensors[full].shape)}, but {self.kind} expects {shape} "
                f"({pattern})",
            )
        scale = scaled_by if scaled_by and scaled_by.format(*layer[1:] if layer else ()) in self.tensors else None
        self.parameters.append(
            Parameter(
                name=self._full(full),
                key=f"{self.name}.{name}",
                axes=tuple(Axis(self.spaces[axis], _SIDES[mark]) for group in groups for mark, axis in group),
                role=role,
                layer=Layer(self.stacks[layer[0]].name, layer[1]) if layer else None,
                closes_branch=closes,
                scaled_by=f"{self.name}.{scale}" if scale else None,
                before_tied=before_tied,
            )
        )

    def add_branch_end(self, linear: str, stream: str, reads: str, *, layer: tuple[str, int], scale: str) -> None:
        """Describes the Linear that ends a residual branch, and the layer scale after it where there is one."""
        closing: dict[str, Any] = {"layer": layer, "closes": True, "scaled_by": scale}
        self.add(f"{linear}.weight", f">{stream} {reads}", "weight", **closing)
        self.add(f"{linear}.bias", f">{stream}", "bias", **closing)
        self.add(scale, f">{stream}", "scale", layer=layer)

    def finish(self) -> Tower:
        """The description; raises UndescribedError naming the first tensor that was not added."""
        described = {parameter.name for parameter in self.parameters}
        for name in self.tensors:
            if self._full(name) not in described:
                raise UndescribedError(self.kind, f"parameter {self._full(name)} is not described for {self.kind}")
        spaces = {space.name: space for space in self.spaces.values()}
        stacks = {stack.name: stack for stack in self.stacks.values()}
        return Tower(self.name, self.kind, spaces, stacks, tuple(self.parameters), dict(self.constants))

    def _full(self, name: str) -> str:
        return self.prefix + name.removeprefix(self.wrapper)


def _groups(pattern: str) -> Iterator[list[tuple[str, str]]]:
    """`(a >b) <c` → [("", a), (">", b)], [("<", c)]."""
    for composite, single in re.findall(r"\(([^)]*)\)|(\S+)", pattern):
        yield [(axis[0], axis[1:]) if axis[0] in "<>" else ("", axis) for axis in (composite or single).split()]
