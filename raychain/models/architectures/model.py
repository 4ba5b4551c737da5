"""A model's description: a CLIP model's two towers and the scalars between them, or a timm model's one backbone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from raychain.models.architectures.open_clip_transformer import describe_text, describe_vit
from raychain.models.architectures.timm_convnext import describe_plain_timm_convnext
from raychain.models.architectures.timm_swin import describe_plain_timm_swin, describe_timm_swin
from raychain.models.architectures.timm_vit import describe_plain_timm_vit, describe_timm_vit
from raychain.models.axes import Tower, UndescribedError

_IMAGE_TOWERS: tuple[Callable[[nn.Module], Tower | None], ...] = (
    describe_vit,
    describe_timm_vit,
    describe_timm_swin,
)
_BACKBONES: tuple[Callable[[nn.Module], Tower | None], ...] = (
    describe_plain_timm_vit,
    describe_plain_timm_swin,
    describe_plain_timm_convnext,
)
_SCALARS = ("logit_scale", "logit_bias")


@dataclass(frozen=True)
class UndescribedTower:
    """A tower no description covers: what it is, and why growing it is an error."""

    kind: str
    reason: str


@dataclass(frozen=True)
class ModelDescription:
    """A model's towers by name (`visual` and `text`, or `backbone`) and the names of the parameters outside of them."""

    towers: Mapping[str, Tower | UndescribedTower]
    scalars: tuple[str, ...]


def describe(model: nn.Module) -> ModelDescription:
    """The axes of every parameter of an open_clip CLIP or CustomTextCLIP model, or of a timm ViT, Swin transformer
    or ConvNeXt, on any device (meta included).

    A tower of an unknown architecture, or with a parameter its architecture's description lacks, is described as
    UndescribedTower: whether that is an error depends on what it should grow into.

    Raises UndescribedError where `model` is no such model.
    """
    for describe_backbone in _BACKBONES:
        if (backbone := describe_backbone(model)) is not None:
            return ModelDescription({"backbone": backbone}, ())
    clip: Any = model
    if not isinstance(getattr(model, "visual", None), nn.Module) or not hasattr(model, "logit_scale"):
        kind = type(model).__name__
        raise UndescribedError(
            kind,
            f"{kind} is no open_clip CLIP model (it has no `visual` and `logit_scale`) and no timm ViT, Swin, ConvNeXt",
        )
    text, prefix = (clip.text, "text.") if hasattr(model, "text") else (clip, "")
    return ModelDescription(
        towers={
            "visual": _tower(clip.visual, "visual.", *_IMAGE_TOWERS),
            "text": _tower(text, prefix, lambda module: describe_text(module, prefix)),
        },
        scalars=tuple(name for name in _SCALARS if getattr(model, name, None) is not None),
    )


def _tower(
    module: nn.Module, prefix: str, *describers: Callable[[nn.Module], Tower | None]
) -> Tower | UndescribedTower:
    try:
        for describe_tower in describers:
            if (tower := describe_tower(module)) is not None:
                return tower
    except UndescribedError as error:
        return UndescribedTower(error.kind, str(error))
    kind = type(module).__name__
    first = next(iter(module.state_dict()), "")
    return UndescribedTower(kind, f"parameter {prefix}{first} is not described: no description covers {kind}")
