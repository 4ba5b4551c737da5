"""Function-preserving growth keeps the function, on weights perturbed like trained ones."""

from typing import Any

import pytest
import torch
from growing import (
    VIT_HOPS,
    VIT_HOPS_ACROSS,
    config,
    cosine,
    embeddings,
    perturb,
    relative_error,
    shortened,
    tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from raychain.growth import DEPTH_OPERATORS, grow
from raychain.models import build
from raychain.models.building import build_config

EXACT = 1e-12


def drift(small: Any, large: Any, width: str = "centred", depth: str = "identity") -> dict[str, tuple[float, float]]:
    """Relative error and cosine of both embeddings after growing `small` into `large`, in float64."""
    small, large = small.double(), large.double()
    grow(small, large, width=width, depth=depth)
    towers = zip(("image", "text"), embeddings(large), embeddings(small), strict=True)
    return {tower: (relative_error(grown, before), cosine(grown, before)) for tower, grown, before in towers}


def hop(small: str, large: str, **vision: Any) -> tuple[Any, Any]:
    """Two members of a family, shortened, the small one perturbed; `vision` changes both image towers."""
    configs = [shortened(small), shortened(large)]
    for cfg in configs:
        cfg["vision_cfg"].update(vision)
    return perturb(build_config(configs[0], seed=0).double()), build_config(configs[1], seed=1)


@pytest.mark.parametrize(("small", "large"), VIT_HOPS + VIT_HOPS_ACROSS)
def test_centred_keeps_the_function_on_every_hop_of_the_vit_family(small: str, large: str) -> None:
    result = drift(*hop(f"CoM-ViT-{small}-16", f"CoM-ViT-{large}-16"))
    assert result["text"][0] < EXACT
    assert result["image"][1] > 1 - 1e-7
    assert result["image"][0] < 3e-4


@pytest.mark.parametrize(("small", "large"), VIT_HOPS + VIT_HOPS_ACROSS)
def test_centred_is_exact_without_ln_pre(small: str, large: str) -> None:
    result = drift(*hop(f"CoM-ViT-{small}-16", f"CoM-ViT-{large}-16", no_ln_pre=True))
    assert result["text"][0] < EXACT
    assert result["image"][0] < EXACT


def test_centred_keeps_the_function_of_the_full_models() -> None:
    result = drift(perturb(build("CoM-ViT-T-16", seed=0).double()), build("CoM-ViT-S-16", seed=1))
    assert result["text"][0] < EXACT
    assert result["image"][1] > 1 - 1e-7


@pytest.mark.parametrize(("small", "large", "error"), [("T", "S", 1e-12), ("S", "B", 2e-3)])
def test_centred_keeps_swins_up_to_what_patch_merging_mixes(small: str, large: str, error: float) -> None:
    """T→S only deepens, which is exact; where the width grows, merged neighbours' means add to a LayerNorm's
    variance.
    """
    result = drift(*hop(f"CoM-Swin-{small}", f"CoM-Swin-{large}"))
    assert result["text"][0] < EXACT
    assert result["image"][0] < error
    assert result["image"][1] > 1 - 1e-6


def test_duplicate_is_exact_where_widths_double() -> None:
    for changes in ({}, {"no_ln_pre": True}, {"pool_type": "avg"}):
        small = perturb(tiny(**{f"vision_{key}": value for key, value in changes.items()}).double())
        wide = {"vision_width": 32, "vision_layers": 5, "text_width": 32, "text_heads": 4, "text_layers": 3}
        large = tiny(1, **wide, **{f"vision_{key}": value for key, value in changes.items()})
        for operator in ("duplicate", "duplicate-uneven"):
            result = drift(small, large, operator)
            assert max(error for error, _ in result.values()) < EXACT


def test_duplicate_is_exact_from_vit_t_to_s() -> None:
    """The image tower doubles, 192 → 384 and 3 → 6 heads."""
    assert drift(*hop("CoM-ViT-T-16", "CoM-ViT-S-16"), "duplicate")["image"][0] < EXACT


def test_duplicate_drifts_a_little_where_widths_do_not_divide() -> None:
    result = drift(*hop("CoM-ViT-B-16", "CoM-ViT-BL-16"), "duplicate")
    assert EXACT < result["image"][0] < 0.2


def test_uneven_duplicates_are_not_copies_of_each_other() -> None:
    small, large = tiny(), tiny(1, text_width=32, text_heads=4)
    grow(small, large, width="duplicate-uneven", depth="identity")
    first, second = large.transformer.resblocks[0].mlp.c_fc.weight.chunk(2, dim=1)
    assert (first - second).abs().min() > 0
    assert torch.allclose(first[:64] + second[:64], small.transformer.resblocks[0].mlp.c_fc.weight, atol=1e-6)


def test_identity_depth_keeps_the_function_and_stays_trainable() -> None:
    small, large = perturb(tiny().double()), tiny(1, vision_layers=5, text_layers=3).double()
    result = drift(small, large, "embed", "identity")
    assert max(error for error, _ in result.values()) < EXACT
    images, tokens = torch.randn(3, 3, 16, 16).double(), torch.randint(1, 20, (3, 6))
    (large.encode_image(images).sum() + large.encode_text(tokens).square().sum()).backward()
    closers = [block.mlp.c_proj.weight.grad for block in large.visual.transformer.resblocks]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in closers)


@pytest.mark.parametrize("pair", [(2, 3), (3, 7), (12, 24), (1, 4), (5, 5)])
def test_depth_operators_cover_every_layer(pair: tuple[int, int]) -> None:
    small, large = pair
    for operator in DEPTH_OPERATORS.values():
        sources = operator(small, large)
        assert len(sources) == large
        assert {source.layer for source in sources if not source.inert} == set(range(small))
    kept = [source.layer for source in DEPTH_OPERATORS["identity"](small, large) if not source.inert]
    assert kept == list(range(small))
    assert [source.layer for source in DEPTH_OPERATORS["stack"](small, large)] == [j % small for j in range(large)]


def towers(draw: Any, small_only: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configs of a small and a large model, both heads and depths random."""
    small, large = dict(small_only), dict(small_only)
    head_dim = draw(st.sampled_from([2, 4, 6]))
    for tower in ("vision", "text"):
        heads = draw(st.integers(1, 4))
        more = draw(st.integers(heads, 7))
        layers = draw(st.integers(1, 3))
        for cfg, count, depth in ((small, heads, layers), (large, more, layers + draw(st.integers(0, 3)))):
            cfg.update({f"{tower}_width": count * head_dim, f"{tower}_layers": depth})
            cfg.update({"vision_head_width": head_dim} if tower == "vision" else {"text_heads": count})
    ratios = draw(st.tuples(st.sampled_from([1.0, 2.0, 4.0]), st.sampled_from([4.0, 4.5])))
    for cfg, ratio in zip((small, large), ratios, strict=True):
        cfg.update(vision_mlp_ratio=ratio)
    return small, large


@st.composite
def any_pair(draw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    common = {
        "vision_no_ln_pre": True,
        "vision_pool_type": draw(st.sampled_from(["tok", "avg"])),
        "vision_final_ln_after_pool": draw(st.booleans()),
        "vision_ls_init_value": draw(st.sampled_from([None, 0.1])),
        "text_ls_init_value": draw(st.sampled_from([None, 1e-3])),
        "quick_gelu": draw(st.booleans()),
        "custom_text": draw(st.booleans()),
        "text_proj_bias": draw(st.booleans()),
        "text_pool_type": draw(st.sampled_from(["argmax", "last"])),
    }
    if common["text_proj_bias"]:
        common["custom_text"] = True
    return towers(draw, common)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(pair=any_pair(), seed=st.integers(0, 99))
def test_centred_is_exact_for_any_widths_depths_and_heads(
    pair: tuple[dict[str, Any], dict[str, Any]], seed: int
) -> None:
    small = perturb(build_config(config(**pair[0]), seed=seed).double(), seed)
    result = drift(small, build_config(config(**pair[1]), seed=seed + 1))
    assert max(error for error, _ in result.values()) < 1e-11


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    heads=st.integers(1, 4),
    times=st.integers(1, 3),
    layers=st.tuples(st.integers(1, 3), st.integers(0, 3)),
    uneven=st.booleans(),
    ln_pre=st.booleans(),
)
def test_duplicate_is_exact_for_any_multiple(
    heads: int, times: int, layers: tuple[int, int], uneven: bool, ln_pre: bool
) -> None:
    small = perturb(tiny(vision_width=8 * heads, vision_layers=layers[0], vision_no_ln_pre=not ln_pre).double())
    large = tiny(1, vision_width=8 * heads * times, vision_layers=sum(layers), vision_no_ln_pre=not ln_pre)
    result = drift(small, large, "duplicate-uneven" if uneven else "duplicate")
    assert max(error for error, _ in result.values()) < EXACT


@settings(max_examples=20, deadline=None, derandomize=True)
@given(heads=st.integers(1, 4), more=st.integers(0, 4), seed=st.integers(0, 99))
def test_ln_pre_costs_centred_little_for_any_width(heads: int, more: int, seed: int) -> None:
    small = perturb(tiny(vision_width=8 * heads, vision_layers=2).double(), seed)
    result = drift(small, tiny(1, vision_width=8 * (heads + more), vision_layers=3))
    assert result["image"][1] > 0.9999


@pytest.mark.parametrize(("operator", "width"), [("centred", 24), ("duplicate", 32)])
def test_growing_the_shared_embedding_keeps_cosines_and_wakes_the_new_dimensions(operator: str, width: int) -> None:
    small = perturb(tiny().double())
    large = tiny(1, embed_dim=24, vision_width=width, text_width=width, text_heads=width // 8).double()
    drift(small, large, operator)
    for now, before in zip(embeddings(large), embeddings(small), strict=True):
        old, new = before / before.norm(dim=-1, keepdim=True), now / now.norm(dim=-1, keepdim=True)
        assert torch.allclose(old @ old.T, new @ new.T, atol=1e-4)
    assert large.visual.proj[:, 16:].abs().max() > 0
    assert large.text_projection[:, 16:].abs().max() == 0
