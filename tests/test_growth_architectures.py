"""Every architecture grows: timm ViTs and Swins inside open_clip's TimmModel, and text towers across image
architectures.
"""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from growing import (
    SWIN_HOPS,
    VIT_HOPS,
    config,
    cosine,
    embeddings,
    inputs,
    perturb,
    relative_error,
    shortened,
    tiny,
)
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from raychain.growth import WIDTH_OPERATORS, GrowthError, check, grow
from raychain.models.building import build_config
from raychain.paradigms.objective import Projector
from raychain.training.distillation import feature_distance

VIT = {"img_size": 16, "patch_size": 8, "num_classes": 0}
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "num_classes": 0, "drop_path_rate": 0.0}


def with_trunk(trunk: Any, size: int, seed: int, proj: str = "linear") -> Any:
    """A tiny open_clip model whose image tower is a TimmModel around `trunk`."""
    cfg = config(vision_timm_model_name="vit_tiny_patch16_224", vision_timm_pool="", vision_timm_proj=proj)
    model: Any = build_config(cfg, seed=seed)
    model.visual.trunk, model.visual.image_size = trunk, (size, size)
    if proj == "linear":
        model.visual.head.proj = nn.Linear(trunk.num_features, 16, bias=False)
    else:
        model.visual.head.mlp.fc1 = nn.Linear(trunk.num_features, 2 * trunk.num_features)
        model.visual.head.mlp.fc2 = nn.Linear(2 * trunk.num_features, 16)
    return model


def timm_vit(width: int, depth: int, seed: int = 0, proj: str = "linear", **options: Any) -> Any:
    torch.manual_seed(seed)
    trunk = VisionTransformer(**VIT, embed_dim=width, depth=depth, num_heads=width // 8, **options)
    return with_trunk(trunk, 16, seed, proj)


def swin(width: int, depths: tuple[int, int], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    heads = (width // 4, width // 2)
    return with_trunk(SwinTransformer(**SWIN, embed_dim=width, depths=depths, num_heads=heads), 32, seed)


def image_drift(small: Any, large: Any, width: str) -> tuple[float, float]:
    small, large = perturb(small.double()), large.double()
    grow(small, large, width=width, depth="identity")
    before, after = embeddings(small)[0], embeddings(large)[0]
    return relative_error(after, before), cosine(after, before)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 1e-2, "qk_norm": True},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg", "reg_tokens": 2},
        {"no_embed_class": True, "reg_tokens": 1, "qkv_bias": False},
        {"proj": "mlp"},
    ],
)
def test_centred_and_duplicate_are_exact_for_timm_vits(options: dict[str, Any]) -> None:
    assert image_drift(timm_vit(16, 2, **options), timm_vit(40, 3, 1, **options), "centred")[0] < 1e-12
    assert image_drift(timm_vit(16, 2, **options), timm_vit(32, 5, 1, **options), "duplicate")[0] < 1e-12


def test_timm_vit_with_norm_pre_keeps_its_direction() -> None:
    small, large = (timm_vit(width, 2, pre_norm=True) for width in (16, 24))
    assert image_drift(small, large, "centred")[1] > 0.9999
    assert image_drift(small, timm_vit(32, 2, pre_norm=True), "duplicate")[0] < 1e-12


def test_swin_depth_keeps_each_blocks_window_shift() -> None:
    """2-2 → 2-6: exact only if a block takes one with the same shift."""
    assert image_drift(swin(8, (2, 2)), swin(8, (2, 6), 1), "centred")[0] < 1e-12
    assert image_drift(swin(8, (2, 2)), swin(16, (4, 6), 1), "duplicate")[0] < 1e-12
    report = grow(swin(8, (2, 2)), swin(8, (2, 6)), width="embed", depth="interleave")
    assert [source.layer for source in report.towers["visual"].layers["visual.stage1"]] == [0, 1, 0, 1, 0, 1]


def test_swin_width_keeps_the_direction() -> None:
    error, direction = image_drift(swin(32, (2, 2)), swin(48, (2, 4), 1), "centred")
    assert error < 0.02
    assert direction > 0.9999


def test_swin_depths_that_would_break_window_pairs_are_refused() -> None:
    with pytest.raises(GrowthError, match=r"visual\.stage1: depths 2 and 3 are not both multiples of 2"):
        check(swin(8, (2, 2)), swin(8, (2, 3)), width="embed", depth="interleave")


def test_embed_aligns_swins_qkv_and_patch_merging() -> None:
    small, large = swin(8, (2, 2)), swin(12, (2, 2), 1)
    grow(small, large, width="embed", depth="interleave")
    old, new = small.visual.trunk.layers[1], large.visual.trunk.layers[1]
    query, key, value = new.blocks[0].attn.qkv.weight.chunk(3)
    for grown, before in zip((query, key, value), old.blocks[0].attn.qkv.weight.chunk(3), strict=True):
        assert torch.equal(grown[:16, :16], before)
    merged = new.downsample.reduction.weight.reshape(24, 4, 12)[:16, :, :8]
    assert torch.equal(merged, old.downsample.reduction.weight.reshape(16, 4, 8))
    table = new.blocks[0].attn.relative_position_bias_table
    assert torch.equal(table[:, :4], old.blocks[0].attn.relative_position_bias_table)


@pytest.mark.parametrize("width", [name for name in WIDTH_OPERATORS if name != "none"])
def test_across_architectures_the_text_tower_grows_alone(width: str) -> None:
    small, large = tiny(), swin(8, (2, 2), 1)
    before = {name: value.clone() for name, value in large.visual.state_dict().items()}
    report = grow(small, large, width=width, depth="identity")
    assert all(torch.equal(before[name], value) for name, value in large.visual.state_dict().items())
    assert torch.equal(large.token_embedding.weight, small.token_embedding.weight)
    visual = report.towers["visual"]
    assert (visual.grown, visual.small, visual.large) == (False, "open_clip VisionTransformer", "timm SwinTransformer")
    assert report.towers["text"].grown
    assert report.inherited < report.total


def hops() -> list[Any]:
    vits = [(f"CoM-ViT-{a}-16", f"CoM-ViT-{b}-16") for a, b in VIT_HOPS]
    swins = [(f"CoM-Swin-{a}", f"CoM-Swin-{b}") for a, b in SWIN_HOPS]
    marked = [pytest.param(*hop, marks=pytest.mark.long if hop[1][-1] in "BL" else pytest.mark.slow) for hop in swins]
    return [*vits, ("CoM-ViT-S-16", "CoM-Swin-T"), *marked]


@pytest.mark.parametrize(("small", "large"), hops())
def test_every_hop_grows_trains_saves_and_loads_in_open_clip(small: str, large: str, tmp_path: Path) -> None:
    """Full widths, few layers and words. ViT-S to Swin-T crosses architectures."""
    configs = [shortened(name) for name in (small, large)]
    if "Swin" in large and "ViT" in small:
        configs[0]["vision_cfg"]["image_size"] = 224
    teacher, student = (build_config(cfg, seed=seed) for seed, cfg in enumerate(configs))
    grow(teacher, student, width="centred", depth="identity")
    projector = Projector(dict.fromkeys(("image", "text"), (configs[1]["embed_dim"], configs[0]["embed_dim"])))
    optimizer = torch.optim.AdamW([*student.parameters(), *projector.parameters()], lr=1e-4)
    images, tokens = inputs(student, count=2)
    for _ in range(3):
        optimizer.zero_grad()
        image, text, scale = student(images, tokens)
        with torch.no_grad():
            wanted = teacher.encode_image(images, normalize=True), teacher.encode_text(tokens, normalize=True)
        distance = feature_distance(projector((image, text)), wanted)
        loss = F.cross_entropy(scale * image @ text.T, torch.arange(2)) + distance
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": configs[1], "preprocess_cfg": {}}))
    save_file(student.state_dict(), tmp_path / "open_clip_model.safetensors")
    loaded = open_clip.create_model(f"local-dir:{tmp_path}")
    for ours, theirs in zip(embeddings(student, 2), embeddings(loaded, 2), strict=True):
        assert torch.equal(ours, theirs)
