"""Plain timm models grow: exactly (Swin's patch merging excepted), in fp64, with weights far from their init."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

import raychain
from raychain.growth import GrowthError

VITS = [
    ("deit_tiny_patch16_224", "deit_small_patch16_224", {}),
    ("deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224", {}),
    ("deit3_small_patch16_224", "deit3_medium_patch16_224", {}),
    ("vit_tiny_patch16_224", "vit_small_patch16_224", {"class_token": False, "global_pool": "avg"}),
    ("vit_small_patch14_reg4_dinov2", "vit_base_patch14_reg4_dinov2", {}),
]


def perturbed(name: str, seed: int, **options: Any) -> nn.Module:
    """A model in fp64 whose every parameter, gains included, is far from its initial value."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=37, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def error(small: nn.Module, large: nn.Module, size: int) -> float:
    images = torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, found = small(images), large(images)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("small", "large", "options"), VITS)
def test_a_vit_grows_to_the_same_logits(small: str, large: str, options: dict[str, Any]) -> None:
    patch = 14 if "patch14" in small else 16
    own = {"img_size": 2 * patch, **options}
    before, after = perturbed(small, 0, depth=2, **own), perturbed(large, 1, depth=3, **own)
    report = raychain.grow(before, after)
    assert report.towers["backbone"].grown
    assert error(before, after, 2 * patch) < 1e-12


def test_a_swin_grows_in_depth_to_the_same_logits_and_in_width_to_nearly_them() -> None:
    base = {"img_size": 56, "window_size": 7}
    small = perturbed("swin_tiny_patch4_window7_224", 0, **base, depths=(2, 2, 2, 2))
    deeper = perturbed("swin_tiny_patch4_window7_224", 1, **base, depths=(2, 2, 4, 2))
    raychain.grow(small, deeper)
    assert error(small, deeper, 56) < 1e-12
    torch.manual_seed(0)
    narrow, wide = (timm.create_model(f"swin_{n}_patch4_window7_224", num_classes=37, **base, depths=(2, 2, 2, 2))
                    .double().eval() for n in ("tiny", "base"))  # fmt: skip
    raychain.grow(narrow, wide)
    assert error(narrow, wide, 56) < 0.05


@pytest.mark.parametrize(("small", "large"), [("vit_tiny_patch16_224", "resnet18"), ("resnet18", "resnet34")])
def test_what_no_description_covers_is_named(small: str, large: str) -> None:
    with pytest.raises(GrowthError, match="ResNet"):
        raychain.grow(timm.create_model(small), timm.create_model(large))
