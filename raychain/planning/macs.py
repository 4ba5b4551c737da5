"""What a model costs: parameters, multiply-accumulates (MACs), and what its forward pass keeps for the backward pass.

MACs follow the convention of method.md, which reproduces the paper's percentages: forward MACs of every matrix product
including the attention products Q·Kᵀ and A·V (full, not halved for the causal mask), embedding look-ups free; training
a sample costs three student forwards (forward, and twice that backward) and one teacher forward, each on one image and
all its captions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from raychain.families import model_config
from raychain.families.building import build_config


class ForwardMacs(NamedTuple):
    """MACs of one forward pass: the image tower on one image, the text tower on one caption, projections included."""

    image: int
    text: int

    def sample(self, captions: int) -> int:
        """MACs of one sample: one image and `captions` captions."""
        return self.image + captions * self.text


class TowerSize(NamedTuple):
    """One tower on one input: parameters, forward MACs, and values kept for the backward pass.

    `kept` counts each tensor that autograd saves once, parameters and attention matrices (which fused attention never
    writes) excepted.
    """

    params: int
    macs: int
    kept: int


class ModelSize(NamedTuple):
    """A model's two towers; the logit scale counts as text."""

    name: str
    image: TowerSize
    text: TowerSize

    @property
    def params(self) -> int:
        """Parameters of both towers."""
        return self.image.params + self.text.params

    @property
    def forward(self) -> ForwardMacs:
        """Forward MACs of both towers."""
        return ForwardMacs(self.image.macs, self.text.macs)

    def kept(self, captions: int) -> int:
        """Values that one sample of one image and `captions` captions keeps for the backward pass."""
        return self.image.kept + captions * self.text.kept


@lru_cache(maxsize=256)
def model_size(name: str, image_size: int | None = None) -> ModelSize:
    """A model of `raychain.families`, counted on shapes alone (nothing is allocated or computed).

    Raises UnknownModelError for an unknown name, ValueError for an image size the model cannot take.
    """
    return ModelSize(name, *tower_sizes(model_config(name), image_size))


def forward_macs(name: str, image_size: int | None = None) -> ForwardMacs:
    """The forward MACs of a model, as `model_size` counts them."""
    return model_size(name, image_size).forward


def stage_macs(student: ForwardMacs, teacher: ForwardMacs | None, samples: int, captions: int) -> int:
    """MACs of training `student` on `samples` samples of one image and `captions` captions, with or without a
    teacher.
    """
    forward = 3 * student.sample(captions) + (teacher.sample(captions) if teacher is not None else 0)
    return samples * forward


def tower_sizes(
    config: dict[str, Any], image_size: int | None = None, *, every_layer: bool = False
) -> tuple[TowerSize, TowerSize]:
    """The image and the text tower of an open_clip config.

    The blocks of open_clip's own transformers are alike: one is counted for all of them, unless `every_layer`.
    """
    depths = {tower: config[tower].get("layers", 12) for tower in ("vision_cfg", "text_cfg")}
    alike = "timm_model_name" not in config["vision_cfg"] and all(isinstance(n, int) for n in depths.values())
    if alike and not every_layer:
        config = config | {tower: {**config[tower], "layers": 1} for tower in depths}
    else:
        depths = dict.fromkeys(depths, 1)
    model: Any = build_config(config, seed=0, image_size=image_size, device="meta").eval()
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    picture = torch.empty(1, 3, height, width, device="meta")
    tokens = torch.zeros(1, model.context_length, dtype=torch.long, device="meta")
    text = getattr(model, "text", model)
    both = _params(model) - _params(model.visual)
    return (
        _count(model, model.encode_image, picture, model.visual, depths["vision_cfg"], _params(model.visual)),
        _count(model, model.encode_text, tokens, text, depths["text_cfg"], both),
    )


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count(
    model: nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    tower: Any,
    depth: int,
    params: int,
) -> TowerSize:
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
        return TowerSize(params, macs, values)
    (macs_before, values_before), (macs_after, values_after) = inside
    more = depth - 1
    return TowerSize(
        params + more * _params(block),
        macs + more * (macs_after - macs_before),
        values + more * (values_after - values_before),
    )
