"""Plain timm models grow: exactly (Swin's patch merging excepted), in fp64, with weights far from their init."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import raychain
from raychain.api.grow import grow_checkpoint
from raychain.errors import InputError
from raychain.growth import GrowthError, Moments, check, grow_moments
from raychain.models import build
from raychain.models.timm_checkpoints import is_timm, read_timm

VITS = [
    ("deit_tiny_patch16_224", "deit_small_patch16_224", {}),
    ("deit_small_patch16_224", "deit_base_patch16_224", {}),
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


def test_a_convnext_grows_in_depth_and_in_whole_multiples_of_its_widths_to_the_same_logits() -> None:
    def convnext(width: int, depths: tuple[int, ...], seed: int) -> nn.Module:
        dims = tuple(width * times for times in (1, 2, 4, 8))
        return perturbed("convnext_tiny", seed, dims=dims, depths=depths)

    small, deeper = convnext(16, (1, 1, 2, 1), 0), convnext(16, (2, 1, 6, 1), 1)
    raychain.grow(small, deeper)
    assert error(small, deeper, 64) < 1e-12
    wider = convnext(32, (1, 1, 3, 1), 1)
    raychain.grow(small, wider, width="duplicate-uneven")
    assert error(small, wider, 64) < 1e-12
    between = convnext(24, (1, 1, 2, 1), 1)
    raychain.grow(small, between)
    assert 1e-3 < error(small, between, 64) < 0.3, "no operator is exact there"


def test_the_convnexts_of_shipped_chains_are_described_on_shapes_alone() -> None:
    with torch.device("meta"):
        models = [timm.create_model(f"convnext_{name}", num_classes=3) for name in ("tiny", "small", "base")]
    check(models[0], models[1], width="centred", depth="identity")
    check(models[1], models[2], width="centred", depth="identity")
    with pytest.raises(GrowthError, match="no block with LayerNorm and layer scale"):
        check(timm.create_model("convnextv2_atto"), timm.create_model("convnextv2_femto"), width="centred",
              depth="identity")  # fmt: skip


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_moments_of_a_classifier_are_the_real_gradients(name: str) -> None:
    """Those of a loss that is linear in the logits, at the small model's positions; what writes the stream without the
    mean over it, which every LayerNorm drops, and layer scales left out (tests/test_growth_moments.py has them).
    """
    sizes = {"img_size": 32, "depth": 2, "num_heads": 2}
    small = perturbed(name, 0, embed_dim=128, **sizes)
    large = perturbed(name, 1, embed_dim=192, **{**sizes, "depth": 3, "num_heads": 3})
    rng = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((4, 3, 32, 32), (4, 37)))

    def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (model(x) * weights).sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    before = gradients(small)
    raychain.grow(small, large)
    moments = Moments(1, before, {n: g**2 for n, g in before.items()})
    grown = grow_moments(small, large, moments, width="centred", depth="identity")
    real, checked = gradients(large), 0
    writers = ("proj.weight", "proj.bias", "fc2.weight", "fc2.bias")
    for n, gradient in real.items():
        source = n.replace("blocks.2.", "blocks.1.")
        if "blocks.1." in n or "gamma" in n or (name.startswith("deit3") and n.endswith(writers) and "blocks" in n):
            continue
        ours, theirs = (_old(value, before[source], "qkv" in n) for value in (grown.exp_avg[n], gradient))
        if n.endswith((*writers, "_token", "pos_embed")):
            dim = 0 if n.endswith(writers) else -1
            ours, theirs = (value - value.mean(dim, keepdim=True) for value in (ours, theirs))
        assert (ours - theirs).norm() / theirs.norm() < 1e-10, n
        assert torch.equal(_old(grown.exp_avg_sq[n], before[source], "qkv" in n) != 0, before[source] != 0), n
        checked += 1
    assert checked >= 20


def _old(value: torch.Tensor, like: torch.Tensor, fused: bool) -> torch.Tensor:
    """The entries at the small model's positions, those of Q, K and V each in its block."""
    if fused:
        pairs = zip(value.chunk(3), like.chunk(3), strict=True)
        return torch.cat([_old(part, small, fused=False) for part, small in pairs])
    return value[tuple(slice(0, size) for size in like.shape)]


@pytest.mark.parametrize(("small", "large"), [("vit_tiny_patch16_224", "resnet18"), ("resnet18", "resnet34")])
def test_what_no_description_covers_is_named(small: str, large: str) -> None:
    with pytest.raises(GrowthError, match="ResNet"):
        raychain.grow(timm.create_model(small), timm.create_model(large))


def test_a_timm_checkpoint_grows_and_unmodified_timm_loads_the_result(tmp_path: Path) -> None:
    small = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32).eval()
    (tmp_path / "small").mkdir()
    timm.models.save_for_hf(small, tmp_path / "small", model_args={"img_size": 32})
    grown = grow_checkpoint(tmp_path / "small", "vit_small_patch16_224", tmp_path / "large")
    assert grown.drift["classifier"].relative_error < 1e-4
    large = timm.create_model(f"local-dir:{tmp_path / 'large'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(large(images), small(images), atol=1e-4)
    assert type(large) is type(small)
    assert large.embed_dim == 384


def test_a_file_of_timm_weights_needs_its_name_and_is_told_from_open_clips(tmp_path: Path) -> None:
    small = timm.create_model("deit_tiny_patch16_224", num_classes=5)
    save_file(small.state_dict(), tmp_path / "deit.safetensors")
    assert is_timm(tmp_path / "deit.safetensors", "deit_tiny_patch16_224")
    assert not is_timm(tmp_path / "deit.safetensors")
    read = read_timm(tmp_path / "deit.safetensors", "deit_tiny_patch16_224")
    assert read.options == {"num_classes": 5}
    save_file(build("CoM-micro-S", seed=0).state_dict(), tmp_path / "clip.safetensors")
    assert not is_timm(tmp_path / "clip.safetensors", "deit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"checkpoint_path": "x"}}, "checkpoint_path"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": "huge"}}, "timm cannot build"),
        ({"architecture": "vit_tiny_patch16_224", "num_classes": 3}, "has shape"),
        ({"architecture": "vit_teeny"}, "no model of timm's"),
    ],
)
def test_a_wrong_timm_folder_is_one_message(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=7).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said):
        grow_checkpoint(tmp_path, "vit_small_patch16_224", tmp_path / "out")


def test_what_a_timm_model_cannot_become_is_one_message(tmp_path: Path) -> None:
    timm.models.save_for_hf(timm.create_model("vit_tiny_patch16_224", num_classes=7), tmp_path / "small")
    for to, said in (
        ("vit_smal_patch16_224", "did you mean vit_small_patch16_224"),
        ("resnet18", "a model of SMALL's kind"),
    ):
        with pytest.raises(InputError, match=said):
            grow_checkpoint(tmp_path / "small", to, tmp_path / "out")
    assert not (tmp_path / "out").exists()
