"""The models of classification by name: timm's, raychain's own names of some, and small ones for CPUs."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NamedTuple, cast

import timm
import torch
from pydantic import JsonValue
from timm.data import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from raychain.core.json import Json
from raychain.errors import nearest
from raychain.models import UnknownModelError
from raychain.models.timm_checkpoints import build_timm

Options = dict[str, JsonValue]


class Named(NamedTuple):
    """A model of raychain's: what `timm.create_model` makes of an architecture with other options."""

    architecture: str
    options: Options
    size: int = 224
    """Pixels a side."""
    crop: float | None = None
    """Side of what evaluation shows of a picture, as a share of its shorter side; None: the architecture's."""


def _micro_deit(width: int, depth: int) -> Named:
    """A DeiT for 40 pixels in patches of 8, with heads of 16."""
    options: Options = {"patch_size": 8, "embed_dim": width, "depth": depth, "num_heads": width // 16}
    return Named("deit_tiny_patch16_224", options, 40, 1.0)


def _micro_swin(width: int, depths: tuple[int, int]) -> Named:
    """A Swin of two stages for 40 pixels in patches of 4 and windows of 5, with heads of 16."""
    options: Options = {"patch_size": 4, "window_size": 5, "embed_dim": width, "depths": list(depths),
                        "num_heads": [width // 16, width // 8]}  # fmt: skip
    return Named("swin_tiny_patch4_window7_224", options, 40, 1.0)


def _micro_convnext(width: int, depths: tuple[int, int, int, int]) -> Named:
    """A ConvNeXt for 40 pixels."""
    options: Options = {"depths": list(depths), "dims": [width, 2 * width, 4 * width, 8 * width]}
    return Named("convnext_tiny", options, 40, 1.0)


OWN: dict[str, Named] = {
    "CoM-DeiT-T": Named("deit_tiny_patch16_224", {}),
    "CoM-DeiT-S": Named("deit_small_patch16_224", {}),
    "CoM-DeiT-B": Named("deit_base_patch16_224", {}),
    "CoM-micro-DeiT-XS": _micro_deit(32, 2),
    "CoM-micro-DeiT-S": _micro_deit(48, 3),
    "CoM-micro-DeiT-M": _micro_deit(80, 4),
    "CoM-micro-DeiT-L": _micro_deit(128, 6),
    "CoM-micro-Swin-S": _micro_swin(32, (2, 2)),
    "CoM-micro-Swin-M": _micro_swin(32, (2, 6)),
    "CoM-micro-ConvNeXt-S": _micro_convnext(12, (1, 1, 2, 1)),
    "CoM-micro-ConvNeXt-M": _micro_convnext(12, (1, 1, 6, 1)),
}
"""raychain's own names."""


def known() -> list[str]:
    """raychain's own names, and timm's."""
    return [*OWN, *timm.list_models()]


def describe(name: str) -> Named:
    """The model of a name. Raises UnknownModelError."""
    if name in OWN:
        return OWN[name]
    plain = name.removeprefix("timm/")
    if not timm.is_model(plain):
        hint = nearest(name[:100], known(), "timm.list_models() has the names of timm's")
        raise UnknownModelError(f"a name of {', '.join(OWN)}, or of timm's; {name[:100]!r} is none: {hint}")
    pretrained = timm.get_pretrained_cfg(plain, allow_unregistered=False)
    return Named(plain, {}, pretrained.input_size[-1] if pretrained else 224)


def configuration(name: str, classes: int, drop_path: float) -> Json:
    """The configuration of a model by name. Raises UnknownModelError for names, and for models that are refused."""
    found = describe(name)
    pretrained = timm.get_pretrained_cfg(found.architecture, allow_unregistered=False)
    config = {
        "architecture": found.architecture,
        "options": found.options | ({"drop_path_rate": drop_path} if drop_path else {}),
        "classes": classes,
        "image_size": found.size,
        "sized": bool(pretrained and pretrained.fixed_input_size),
        "mean": list(pretrained.mean if pretrained else IMAGENET_DEFAULT_MEAN),
        "std": list(pretrained.std if pretrained else IMAGENET_DEFAULT_STD),
        "crop_pct": found.crop or (pretrained.crop_pct if pretrained else None) or DEFAULT_CROP_PCT,
        "interpolation": "bilinear" if pretrained and pretrained.interpolation == "bilinear" else "bicubic",
    }
    if (reason := _refused(json.dumps(config, sort_keys=True))) is not None:
        raise UnknownModelError(f"model {name} cannot be trained: {reason}")
    return config


def options_of(config: Any, size: int) -> Options:
    """What `timm.create_model` is given for a configuration at an input size."""
    size_too = {"img_size": size} if config["sized"] else {}
    # Swin's default drops paths at 0.1
    return {"num_classes": config["classes"], "drop_path_rate": 0.0, **config["options"], **size_too}


def build(config: Any, size: int, *, seed: int, device: str | torch.device = "cpu") -> nn.Module:
    """A model in fp32 with random weights. Raises ValueError where it does not take pictures of that size."""
    architecture: str = config["architecture"]
    try:
        model = build_timm(architecture, options_of(config, size), seed=seed, device=device)
    except ValueError as error:  # an option that only some models take is no option of the others
        plain = {k: v for k, v in options_of(config, size).items() if k != "drop_path_rate" or v}
        if "drop_path_rate" not in str(error) or len(plain) == len(options_of(config, size)):
            raise
        model = build_timm(architecture, plain, seed=seed, device=device)
    patch: Any = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is not None and size % int(patch[0] if isinstance(patch, tuple) else patch):
        raise ValueError(f"image size {size} is no multiple of {architecture}'s patches")
    seen = {name: tuple(config[name]) for name in ("mean", "std")}
    cast(Any, model).pretrained_cfg = {**cast(Any, model).pretrained_cfg, **seen}
    return model


def width_of(config: Any) -> int:
    """Numbers that the model's classifier reads."""
    return _width(json.dumps({**config, "image_size": 0}, sort_keys=True), config["image_size"])


@lru_cache(maxsize=128)
def _width(config: str, size: int) -> int:
    return int(cast(Any, build(json.loads(config), size, seed=0, device="meta")).get_classifier().in_features)


@lru_cache(maxsize=128)
def _refused(config: str) -> str | None:
    """Why a model is not trained here; None if it is."""
    described = json.loads(config)
    try:
        model: Any = build(described, described["image_size"], seed=0, device="meta")
    except ValueError as error:
        return str(error)
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        return (
            "it has BatchNorm, whose statistics are those of one worker's part of a batch: results would depend "
            "on the number of workers and on micro-batches. Models with LayerNorm (ViT, DeiT, Swin, ConvNeXt) are exact"
        )
    if any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        return (
            "it has dropout, whose draws would depend on the number of workers; stochastic depth (drop_path) does not"
        )
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        return f"its classifier is no single linear layer ({type(classifier).__name__})"
    x = torch.zeros(2, 3, described["image_size"], described["image_size"], device="meta")
    try:
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        fits = pooled.shape == (2, classifier.in_features)
    except Exception as error:  # a timm model's own code, which was written for whatever it takes
        return f"it cannot be run on pictures of {described['image_size']} pixels ({str(error).partition(chr(10))[0]})"
    return None if fits else f"what its classifier reads is no vector ({tuple(pooled.shape)})"
