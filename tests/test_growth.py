"""Growing open_clip's own towers by the paper's rule, and what is refused."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from growing import VIT_HOPS, VIT_HOPS_ACROSS, shortened, tiny
from torch import nn

from raychain.growth import DEPTH_OPERATORS, WIDTH_OPERATORS, GrowthError, Moments, check, grow, grow_moments
from raychain.models import build
from raychain.models.building import build_config


def vit(size: str, **kwargs: Any) -> nn.Module:
    return build(f"CoM-ViT-{size}-16", **{"seed": 0, **kwargs})


@pytest.mark.parametrize(("small", "large"), VIT_HOPS + VIT_HOPS_ACROSS)
def test_every_hop_of_the_vit_family_can_grow(small: str, large: str) -> None:
    check(vit(small, device="meta"), vit(large, device="meta"), width="embed", depth="interleave")


def embedded_by_hand(
    small: nn.Module, large: nn.Module, layers: dict[str, list[int]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The paper's rule from names alone: top-left corners, the fused projection in three blocks."""
    source = small.state_dict()
    for name, init in large.state_dict().items():
        origin = name
        if ".resblocks." in name:
            stack, rest = name.split(".resblocks.")
            index, rest = rest.split(".", 1)
            origin = f"{stack}.resblocks.{layers[stack][int(index)]}.{rest}"
        value, expected = source[origin], init.clone()
        pairs = zip(expected.chunk(3), value.chunk(3), strict=True) if "in_proj" in name else [(expected, value)]
        for block, part in pairs:
            block[tuple(slice(0, min(a, b)) for a, b in zip(part.shape, block.shape, strict=True))] = part
        yield name, expected


def public_rule(small: nn.Module, large: nn.Module, deeper: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The public code's `weight_initialization`: it walks the small model's tensors and writes top-left corners.

    Where the image tower is deeper, its layer i goes to 2i and 2i + 1.
    """
    grown = {name: value.clone() for name, value in large.state_dict().items()}
    for name, value in small.state_dict().items():
        names = [name]
        if deeper and name.startswith("visual.transformer"):
            before, index, rest = name.split(".")[:3], int(name.split(".")[3]), name.split(".")[4:]
            names = [".".join([*before, str(2 * index + copy), *rest]) for copy in (0, 1)]
        for target in names:
            if value.ndim in (1, 2):
                grown[target][tuple(slice(0, size) for size in value.shape)] = value
            elif value.ndim == 4:
                grown[target][: value.shape[0]] = value
            elif value.ndim == 0:
                grown[target] = value
    yield from grown.items()


def pair(small: str, large: str) -> tuple[Any, Any]:
    """Two family members: ViT-T→S in full, others with a sixth of the layers."""
    if small == "T":
        return vit(small), vit(large, seed=1)
    return tuple(build_config(shortened(f"CoM-ViT-{size}-16"), seed=seed) for seed, size in enumerate((small, large)))


@pytest.mark.parametrize(("small", "large"), [("T", "S"), ("B", "L")])
def test_embed_is_the_papers_rule_element_for_element(small: str, large: str) -> None:
    teacher, student = pair(small, large)
    before, after = (len(model.visual.transformer.resblocks) for model in (teacher, student))
    image_layers = [index * before // after for index in range(after)]
    text_layers = [*range(len(student.transformer.resblocks))]
    by_hand = embedded_by_hand(teacher, student, {"visual.transformer": image_layers, "transformer": text_layers})
    expected = dict(by_hand)
    report = grow(teacher, student, width="embed", depth="interleave")
    grown = student.state_dict()
    assert all(torch.equal(grown[name], value) for name, value in expected.items())
    assert report.inherited == report.total == len(grown)
    assert [source.layer for source in report.towers["visual"].layers["visual.layers"]] == image_layers
    assert report.towers["text"].widths["text.embed"] == (
        teacher.token_embedding.embedding_dim,
        student.token_embedding.embedding_dim,
    )


@pytest.mark.parametrize(("small", "large"), [("T", "S"), ("B", "L")])
def test_reference_is_the_public_codes_rule_element_for_element(small: str, large: str) -> None:
    teacher, student = pair(small, large)
    expected = dict(public_rule(teacher, student, deeper=large == "L"))
    grow(teacher, student, width="reference", depth="interleave")
    grown = student.state_dict()
    assert all(torch.equal(grown[name], value) for name, value in expected.items())
    width = teacher.visual.conv1.out_channels
    wider = student.visual.conv1.out_channels
    query = grown["visual.transformer.resblocks.0.attn.in_proj_weight"][:wider]
    key = teacher.visual.transformer.resblocks[0].attn.in_proj_weight[width:wider]
    assert torch.equal(query[width:, :width], key)


def test_report_says_what_happened_in_plain_types() -> None:
    report = grow(tiny(), tiny(1, vision_width=24, vision_layers=3), width="centred", depth="identity").as_dict()
    assert report["towers"]["visual"]["layers"] == {"visual.layers": [0, 0, 1]}
    assert report["towers"]["visual"]["identity"] == {"visual.layers": [1]}
    assert report["towers"]["visual"]["widths"]["visual.embed"] == [16, 24]
    assert json.loads(json.dumps(report)) == report


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


def test_none_inherits_the_logit_scale_alone() -> None:
    small, large = tiny(), tiny(1, vision_width=32, text_width=32, text_heads=4)
    small.logit_scale.data.fill_(1.5)
    before = {name: value.clone() for name, value in large.state_dict().items()}
    grow(small, large, width="none", depth="interleave")
    changed = [name for name, value in large.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["logit_scale"]
    moments = Moments(3, *[{name: torch.ones_like(p) for name, p in small.named_parameters()}] * 2)
    grown = grow_moments(small, large, moments, width="none", depth="interleave")
    for moment in (grown.exp_avg, grown.exp_avg_sq):
        assert all(not value.any() for name, value in moment.items() if name != "logit_scale")


@pytest.mark.parametrize("shrink", [0.0, 0.25, 1.0])
def test_shrink_lies_between_the_random_start_and_the_grown_weights(shrink: float) -> None:
    small, start, grown, shrunk = tiny(), *(tiny(1, vision_width=24, vision_layers=4) for _ in range(3))
    small.logit_scale.data.fill_(1.5)
    grow(small, grown, width="centred", depth="identity")
    grow(small, shrunk, width="centred", depth="identity", shrink=shrink)
    random, whole, found = start.state_dict(), grown.state_dict(), shrunk.state_dict()
    assert found.pop("logit_scale").item() == 1.5
    for name, value in found.items():
        torch.testing.assert_close(value, shrink * whole[name] + (1 - shrink) * random[name])
    closing = "visual.transformer.resblocks.1.mlp.c_proj.weight"
    assert not whole[closing].any()
    assert torch.equal(found[closing], (1 - shrink) * random[closing])


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
