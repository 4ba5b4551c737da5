"""Small and trained-like models for the growth tests."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from raychain.models import model_config
from raychain.models.building import build_config

VIT_HOPS = [("T", "C"), ("C", "S"), ("S", "M"), ("M", "B"), ("B", "BL"), ("BL", "L")]
VIT_HOPS_ACROSS = [("T", "S"), ("S", "B"), ("B", "L")]
SWIN_HOPS = [("T", "S"), ("S", "B"), ("B", "L")]


def config(**changes: Any) -> dict[str, Any]:
    """A tiny CLIP's model_cfg; changes are `vision_width=…`, `text_layers=…`, or top-level keys."""
    cfg: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
        "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2},
    }
    for key, value in changes.items():
        tower, _, name = key.partition("_")
        if tower in ("vision", "text"):
            cfg[f"{tower}_cfg"][name] = value
        else:
            cfg[key] = value
    return cfg


def tiny(seed: int = 0, **changes: Any) -> Any:
    """A tiny open_clip model."""
    return build_config(config(**changes), seed=seed)


def shortened(name: str) -> dict[str, Any]:
    """A family member's model_cfg with its widths and heads, but few layers, words and pixels."""
    cfg = deepcopy(model_config(name))
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    if "timm_model_name" not in vision:
        vision.update(layers=vision["layers"] // 6, image_size=32)
    text.update(layers=2, vocab_size=64, context_length=8)
    return cfg


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights as after training: gains around 1 ± 0.3, biases away from zero, layer scales spread, noise on every
    matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        if parameter.ndim == 0:
            parameter.add_(0.1)
        elif "gamma" in name:
            parameter.mul_(1 + 0.5 * noise)
        elif parameter.ndim == 1:
            parameter.add_((0.3 if name.endswith("weight") else 0.1) * noise)
        else:
            parameter.add_(0.5 * parameter.std() * noise)
    return model


def inputs(model: Any, count: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images [count, 3, H, W] in the model's dtype and tokens [count, context]."""
    generator = torch.Generator().manual_seed(seed)
    dtype = model.logit_scale.dtype
    images = torch.randn(count, 3, *model.visual.image_size, generator=generator, dtype=torch.float64).to(dtype)
    tokens = torch.randint(1, model.vocab_size, (count, model.context_length), generator=generator)
    return images, tokens


@torch.no_grad()
def embeddings(model: Any, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and text embeddings [count, embed_dim] of the same random inputs for models of one family."""
    images, tokens = inputs(model, count)
    model.eval()
    return model.encode_image(images), model.encode_text(tokens)


def relative_error(given: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖given - wanted‖ / ‖wanted‖ over the dimensions both have."""
    shared = min(given.shape[-1], wanted.shape[-1])
    given, wanted = given[..., :shared], wanted[..., :shared]
    return float((given - wanted).norm() / wanted.norm())


def cosine(given: torch.Tensor, wanted: torch.Tensor) -> float:
    """The smallest cosine between rows, over the dimensions both have."""
    shared = min(given.shape[-1], wanted.shape[-1])
    return float(torch.cosine_similarity(given[..., :shared], wanted[..., :shared], dim=-1).min())
