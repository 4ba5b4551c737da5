"""What a model costs: parameters, multiply-accumulates (MACs), and what its forward pass keeps for the backward pass.

MACs follow the convention of docs/method.md, which reproduces the paper's percentages: forward MACs of every matrix
product including the attention products Q·Kᵀ and A·V (full, not halved for the causal mask), embedding look-ups free;
training a sample costs three student forwards (forward, and twice that backward) and one teacher forward, each on all
inputs of the sample (CLIP: one image and its captions in the loss).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from raychain.models.building import build_config, encode_one
from raychain.models.configs import ModelConfig

Items = Mapping[str, float]
"""How many inputs of each part a sample has: {"image": 1, "text": captions in the loss}."""


class PartSize(NamedTuple):
    """One part of a model (a tower, a decoder) on one input: parameters, forward MACs, values kept for backward.

    `kept` counts each tensor that autograd saves once, parameters and attention matrices (which fused attention never
    writes) excepted.
    """

    params: int
    macs: int
    kept: int


@dataclass(frozen=True)
class ModelSize:
    """A model's parts by name. Every parameter belongs to one of them (CLIP's logit scale to the text tower)."""

    name: str
    parts: Mapping[str, PartSize]
    principal: str
    """The part whose parameters expansion ratios and the smallest model are about: the image tower, the backbone."""
    for_loss: tuple[str, ...] = ()
    """Parts that run for the loss alone: a teacher does without them."""

    @property
    def params(self) -> int:
        """Parameters of all parts."""
        return sum(part.params for part in self.parts.values())

    @property
    def principal_params(self) -> int:
        """Parameters of the principal part."""
        return self.parts[self.principal].params

    def forward(self, items: Items) -> int:
        """Forward MACs of a sample with so many inputs of each part."""
        return round(sum(items[name] * part.macs for name, part in self.parts.items()))

    def teaching(self, items: Items) -> int:
        """Forward MACs of a sample where the model is a teacher, which is asked for its features alone."""
        return round(sum(items[name] * part.macs for name, part in self.parts.items() if name not in self.for_loss))

    def kept(self, items: Items) -> int:
        """Values that a sample with so many inputs of each part keeps for the backward pass."""
        return round(sum(items[name] * part.kept for name, part in self.parts.items()))


def stage_macs(student: ModelSize, teacher: ModelSize | None, samples: int, items: Items, taught: int = 0) -> int:
    """MACs of training `student` on `samples` samples with so many inputs of each part, with or without a teacher.

    The teacher runs on the first `taught` of them; 0: on all.
    """
    followed = (taught or samples) * teacher.teaching(items) if teacher is not None else 0
    return samples * 3 * student.forward(items) + followed


def tower_sizes(
    config: ModelConfig, image_size: int | None = None, *, every_layer: bool = False
) -> tuple[PartSize, PartSize]:
    """The image and the text tower of an open_clip config, counted on shapes alone (nothing is allocated or computed).

    The blocks of open_clip's own transformers are alike: one is counted for all of them, unless `every_layer`. Raises
    ValueError for an image size that the model cannot take, and for a config of which no model comes that gives a
    picture and a caption one vector each.
    """
    depths = {tower: config[tower].get("layers", 12) for tower in ("vision_cfg", "text_cfg")}
    alike = "timm_model_name" not in config["vision_cfg"] and all(isinstance(n, int) for n in depths.values())
    if alike and not every_layer:
        config = config | {tower: {**config[tower], "layers": 1} for tower in depths}
    else:
        depths = dict.fromkeys(depths, 1)
    model: Any = build_config(config, seed=0, image_size=image_size, device="meta").eval()
    width = config["embed_dim"]
    text = getattr(model, "text", model)
    both = _params(model) - _params(model.visual)
    return (
        _count(
            model,
            lambda _: encode_one(model, "image", width),
            None,
            model.visual,
            depths["vision_cfg"],
            _params(model.visual),
        ),
        _count(model, lambda _: encode_one(model, "text", width), None, text, depths["text_cfg"], both),
    )


def whole_size(model: nn.Module, forward: Callable[[Any], object], sample: Mapping[str, torch.Tensor]) -> PartSize:
    """A model on the meta device as one part, counted as `forward` runs it on a batch of one sample."""
    return _count(
        model, forward, {name: column.to("meta") for name, column in sample.items()}, model, 1, _params(model)
    )


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count(
    model: nn.Module,
    forward: Callable[[Any], object],
    inputs: object,
    tower: Any,
    depth: int,
    params: int,
) -> PartSize:
    """The tower that `forward` runs; with `depth` above 1 its only block stands for that many."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    attends = any(isinstance(m, nn.MultiheadAttention) or hasattr(m, "fused_attn") for m in tower.modules())
    kept: dict[int, torch.Tensor] = {}  # the tensors stay alive, so that no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        is_attention = attends and tensor.ndim >= 3 and tensor.shape[-1] == tensor.shape[-2]
        if not is_attention and (address := tensor.untyped_storage()._cdata) not in own:
            kept[address] = tensor
        return tensor

    def now() -> tuple[int, int]:
        return counter.get_total_flops() // 2, sum(tensor.untyped_storage().nbytes() // 4 for tensor in kept.values())

    inside: list[tuple[int, int]] = []
    block = tower.transformer.resblocks[0] if depth > 1 else nn.Module()
    block.register_forward_pre_hook(lambda *_: inside.append(now()))
    block.register_forward_hook(lambda *_: inside.append(now()))
    # Gradients stay enabled: without them nn.MultiheadAttention takes a fused path that the counter does not see.
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        FlopCounterMode(display=False) as counter,
    ):
        forward(inputs)
    macs, values = now()
    if depth == 1:
        return PartSize(params, macs, values)
    (macs_before, values_before), (macs_after, values_after) = inside
    more = depth - 1
    return PartSize(
        params + more * _params(block),
        macs + more * (macs_after - macs_before),
        values + more * (values_after - values_before),
    )
