"""Growing open_clip's own towers by the paper's rule, and what is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from raychain.families import build
from raychain.families.building import build_config
from raychain.growth import DEPTH_OPERATORS, WIDTH_OPERATORS, GrowthError, check, grow

HOPS = [("T", "C"), ("C", "S"), ("S", "M"), ("M", "B"), ("B", "BL"), ("BL", "L"), ("T", "S"), ("S", "B"), ("B", "L")]


def vit(size: str, **kwargs: Any) -> nn.Module:
    return build(f"CoM-ViT-{size}-16", **{"seed": 0, **kwargs})


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


def tiny(seed: int = 0, **changes: Any) -> nn.Module:
    return build_config(config(**changes), seed=seed)


@pytest.mark.parametrize(("small", "large"), HOPS)
def test_every_hop_of_the_vit_family_can_grow(small: str, large: str) -> None:
    check(vit(small, device="meta"), vit(large, device="meta"), width="embed", depth="interleave")


def hand_embedded(
    small: nn.Module, large: nn.Module, layer: dict[str, list[int]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The paper's rule by hand, from names: top-left corners, the fused projection in three blocks."""
    source = small.state_dict()
    for name, init in large.state_dict().items():
        origin = name
        if ".resblocks." in name:
            stack, index, rest = name.split(".resblocks.")[0], *name.split(".resblocks.")[1].split(".", 1)
            origin = f"{stack}.resblocks.{layer[stack][int(index)]}.{rest}"
        value, expected = source[origin], init.clone()
        if "in_proj" in name:
            for block, part in zip(expected.chunk(3), value.chunk(3), strict=True):
                block[tuple(slice(0, n) for n in part.shape)] = part
        elif value.ndim == 0:
            expected = value
        else:
            region = tuple(slice(0, min(a, b)) for a, b in zip(value.shape, init.shape, strict=True))
            expected[region] = value[region]
        yield name, expected


@pytest.mark.parametrize(("small", "large"), [("T", "S"), ("B", "L")])
def test_embed_is_the_papers_rule_element_for_element(small: str, large: str) -> None:
    teacher, student = vit(small), vit(large, seed=1)
    layers = len(student.visual.transformer.resblocks)
    image_layers = [index * 12 // layers for index in range(layers)]
    expected = dict(hand_embedded(teacher, student, {"visual.transformer": image_layers, "transformer": [*range(12)]}))
    report = grow(teacher, student, width="embed", depth="interleave")
    grown = student.state_dict()
    assert all(torch.equal(grown[name], value) for name, value in expected.items())
    assert report.inherited == report.total == len(grown)
    assert [source.layer for source in report.towers["visual"].layers["visual.layers"]] == image_layers
    assert report.towers["text"].widths["text.embed"] == (
        teacher.token_embedding.embedding_dim,
        student.token_embedding.embedding_dim,
    )


def test_growth_touches_neither_the_small_model_nor_the_random_state() -> None:
    small, large = tiny(), tiny(vision_width=24, vision_layers=3)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    state = torch.get_rng_state()
    grow(small, large, width="embed", depth="interleave")
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in large.parameters())


def test_shared_embedding_may_shrink_and_keeps_the_overlap() -> None:
    small, large = tiny(), tiny(1, vision_width=24, text_width=24, text_heads=3, embed_dim=8)
    grow(small, large, width="embed", depth="interleave")
    assert torch.equal(large.visual.proj[:16], small.visual.proj[:, :8])
    assert torch.equal(large.text_projection[:16], small.text_projection[:, :8])


def test_logit_scale_is_inherited() -> None:
    small, large = tiny(), tiny(1)
    with torch.no_grad():
        small.logit_scale.fill_(3.0)
    grow(small, large, width="embed", depth="interleave")
    assert large.logit_scale.item() == 3.0


def test_custom_text_layout_grows_from_the_plain_one() -> None:
    small, large = tiny(), tiny(1, custom_text=True)
    grow(small, large, width="embed", depth="interleave")
    assert torch.equal(large.text.token_embedding.weight, small.token_embedding.weight)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"vision_width": 8}, "axis visual.patches: 8 is narrower than the 16"),
        ({"text_width": 8, "text_heads": 1}, "axis text.embed: 8 is narrower than the 16"),
        ({"vision_layers": 1}, "visual.layers: 1 layers are fewer than the 2"),
        ({"vision_head_width": 4}, "axis visual.head_dim: 8 in the smaller model, 4 in the larger"),
        ({"vision_image_size": 32}, "visual.positional_embedding, axis visual.position: 5 .* 17"),
        ({"text_vocab_size": 30}, "token_embedding.weight, axis text.vocab: 20 .* 30"),
        ({"vision_no_ln_pre": True}, "counterpart|axis"),
        ({"vision_ls_init_value": 0.1}, "ls_1.gamma has no counterpart"),
        ({"vision_attentional_pool": True}, "visual.attn_pool.query is not described"),
        ({"vision_qk_norm": True}, "visual.transformer.resblocks.0.* is not described"),
    ],
)
def test_what_cannot_grow_is_an_error_that_names_it(changes: dict[str, Any], names: str) -> None:
    small, large = tiny(), tiny(1, **changes)
    before = {name: value.clone() for name, value in large.state_dict().items()}
    for operation in (check, grow):
        with pytest.raises(GrowthError, match=names):
            operation(small, large, width="embed", depth="interleave")
    assert all(torch.equal(before[name], value) for name, value in large.state_dict().items())


def test_a_parameter_no_description_covers_is_an_error() -> None:
    small, large = tiny(), tiny(1)
    for model in (small, large):
        model.visual.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(GrowthError, match=r"parameter visual.extra is not described"):
        check(small, large, width="embed", depth="interleave")


def test_unknown_operators_are_named_with_the_nearest() -> None:
    with pytest.raises(GrowthError, match=r"unknown width operator 'embd'.*did you mean 'embed'"):
        check(tiny(), tiny(), width="embd", depth="interleave")
    with pytest.raises(GrowthError, match="unknown depth operator"):
        check(tiny(), tiny(), width="embed", depth="sideways")
    assert "embed" in WIDTH_OPERATORS
    assert "interleave" in DEPTH_OPERATORS


@pytest.mark.parametrize(("small", "large", "expected"), [(2, 4, [0, 0, 1, 1]), (2, 3, [0, 0, 1]), (3, 3, [0, 1, 2])])
def test_interleave_copies_each_layer_to_its_successors(small: int, large: int, expected: list[int]) -> None:
    assert [source.layer for source in DEPTH_OPERATORS["interleave"](small, large)] == expected
