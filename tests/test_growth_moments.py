"""Optimiser moments grow as gradients do: checked against real gradients through both models."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from growing import config, inputs, perturb, shortened, tiny

from raychain.growth import Moments, grow, grow_moments, read_moments, write_moments
from raychain.models.building import build_config

WIDER = {"vision_width": 32, "vision_layers": 3, "text_width": 32, "text_heads": 4, "text_layers": 4}
WIDER_UNEVEN = {"vision_width": 24, "vision_layers": 3, "text_width": 40, "text_heads": 5, "text_layers": 2}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients of a contrastive loss on fixed random inputs."""
    images, tokens = inputs(model, count=4)
    model.eval().zero_grad()
    image, text, scale = model(images, tokens)
    F.cross_entropy(scale * image @ text.T, torch.arange(4)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def grown_gradients(
    small: Any, large: Any, width: str, depth: str = "identity"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """The large model's real gradients, those grown from the small model's, and its identity blocks."""
    before = gradients(small)
    report = grow(small, large, width=width, depth=depth)
    moments = Moments(1, before, {name: gradient**2 for name, gradient in before.items()})
    grown = grow_moments(small, large, moments, width=width, depth=depth)
    return gradients(large), dict(grown.exp_avg), report.as_dict()["towers"]


def in_identity_block(name: str, towers: dict[str, Any]) -> bool:
    if ".resblocks." not in f".{name}":
        return False
    tower = "visual" if name.startswith("visual.") else "text"
    index = int(name.split("resblocks.")[1].split(".")[0])
    return index in towers[tower]["identity"][f"{tower}.layers"]


@pytest.mark.parametrize("changes", [{}, {"vision_ls_init_value": 0.5, "text_ls_init_value": 0.5}])
def test_duplicate_moments_are_the_real_gradients(changes: dict[str, Any]) -> None:
    small, large = perturb(tiny(**changes).double()), tiny(1, **WIDER, **changes).double()
    real, grown, towers = grown_gradients(small, large, "duplicate")
    checked = 0
    for name, gradient in real.items():
        if not in_identity_block(name, towers):
            assert torch.allclose(grown[name], gradient, atol=1e-12, rtol=1e-9), name
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("changes", [{}, {"vision_ls_init_value": 0.5, "text_ls_init_value": 0.5}])
def test_centred_moments_are_the_real_gradients(changes: dict[str, Any]) -> None:
    """At old positions exactly, but that a token's gradient along the all-ones direction of the stream is not
    determined.

    Every LayerNorm drops that direction; what writes the stream is compared with it taken out, and a layer scale, where
    tokens mix before it could be, only by its direction.
    """
    changes = {**changes, "vision_no_ln_pre": True}
    small, large = perturb(tiny(**changes).double()), tiny(1, **{**WIDER_UNEVEN, **changes}).double()
    old = dict(small.named_parameters())
    real, grown, towers = grown_gradients(small, large, "centred")
    checked = 0
    for name, gradient in real.items():
        if in_identity_block(name, towers):
            continue
        source = name if name in old else name.replace("resblocks.2.", "resblocks.1.")
        ours, theirs = (old_positions(value, old[source], "in_proj" in name) for value in (grown[name], gradient))
        if "gamma" in name:
            assert F.cosine_similarity(ours, theirs, dim=0) > 0.95, name
            continue
        stream = stream_dimension(name)
        if stream is not None:
            scale = old[layer_scale(source)] if layer_scale(source) in old else torch.ones(len(ours))
            if stream == 0:
                ours, theirs = (value / scale.reshape(-1, *[1] * (value.ndim - 1)) for value in (ours, theirs))
            ours, theirs = (value - value.mean(stream, keepdim=True) for value in (ours, theirs))
        assert torch.allclose(ours, theirs, atol=1e-12, rtol=1e-9), name
        checked += 1
    assert checked > 40


def old_positions(value: torch.Tensor, like: torch.Tensor, fused: bool) -> torch.Tensor:
    """The entries at the small model's positions, those of Q, K and V each in its block."""
    if fused:
        blocks = zip(value.chunk(3), like.chunk(3), strict=True)
        return torch.cat([old_positions(block, part, fused=False) for block, part in blocks])
    return value[tuple(slice(0, size) for size in like.shape)]


def layer_scale(name: str) -> str:
    """The layer scale behind a branch's last Linear, if there is one."""
    return name.rpartition("attn.out_proj" if "attn" in name else "mlp.c_proj")[0] + (
        "ls_1.gamma" if "attn" in name else "ls_2.gamma"
    )


def stream_dimension(name: str) -> int | None:
    """The dimension along which a parameter writes the residual stream."""
    if name.endswith(("out_proj.weight", "out_proj.bias", "c_proj.weight", "c_proj.bias", "conv1.weight")):
        return 0
    if name.endswith(("token_embedding.weight", "positional_embedding", "class_embedding")):
        return -1
    return None


@pytest.mark.parametrize("width", ["centred", "duplicate", "duplicate-uneven", "embed", "reference"])
def test_second_moments_grow_by_the_square(width: str) -> None:
    small, large = tiny(), tiny(1, **WIDER_UNEVEN)
    generator = torch.Generator().manual_seed(0)
    first = {name: torch.rand(p.shape, generator=generator) + 0.1 for name, p in small.named_parameters()}
    moments = Moments(3, first, {name: value.double() ** 2 for name, value in first.items()})
    grown = grow_moments(small, large, moments, width=width, depth="interleave")
    for name, value in grown.exp_avg.items():
        known = value != 0
        assert torch.allclose(grown.exp_avg_sq[name][known], value[known] ** 2, rtol=1e-5), name
        if not known.all():
            fill = grown.exp_avg_sq[name][~known]
            assert torch.allclose(fill, grown.exp_avg_sq[name][known].mean().expand_as(fill), rtol=1e-4), name


def test_identity_blocks_start_without_momentum() -> None:
    small, large = tiny(), tiny(1, vision_layers=4)
    ones = {name: torch.ones_like(parameter) for name, parameter in small.named_parameters()}
    grown = grow_moments(small, large, Moments(3, ones, ones), width="centred", depth="identity")
    name = "visual.transformer.resblocks.{}.mlp.c_fc.weight"
    assert grown.exp_avg[name.format(1)].abs().max() == 0
    assert grown.exp_avg_sq[name.format(1)].min() == 1
    assert grown.exp_avg[name.format(2)].min() == 1


def test_moments_pass_from_one_optimiser_to_the_next() -> None:
    small, large = tiny(), tiny(1, vision_width=24)
    old, new = (torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (small, large))
    images, tokens = inputs(small)
    for _ in range(2):
        (small.encode_image(images).sum() + small.encode_text(tokens).sum()).backward()
        old.step()
    moments = read_moments(small, old)
    assert moments.step == 2
    assert "logit_scale" not in moments.exp_avg
    grown = grow_moments(small, large, moments, width="centred", depth="identity")
    write_moments(large, new, grown)
    state = new.state[large.visual.conv1.weight]
    assert state["exp_avg"].shape == large.visual.conv1.weight.shape
    assert state["exp_avg"].abs().sum() > 0
    (large.encode_image(images).sum() + large.encode_text(tokens).sum()).backward()
    new.step()
    assert int(new.state[large.visual.conv1.weight]["step"]) == 3
    assert read_moments(large, new).step == 3


def test_towers_that_do_not_grow_get_no_moments() -> None:
    swin = shortened("CoM-Swin-T")
    small = build_config({**swin, "vision_cfg": config()["vision_cfg"]}, seed=0)
    ones = {name: torch.ones_like(parameter) for name, parameter in small.named_parameters()}
    grown = grow_moments(small, build_config(swin, seed=0), Moments(1, ones, ones), width="embed", depth="stack")
    assert grown.exp_avg
    assert not any(name.startswith("visual.") for name in grown.exp_avg)
