"""Names, configs and building of models."""

import json
from pathlib import Path

import open_clip
import pytest
import torch

from raychain.models import UnknownModelError, build, model_config, model_names, parameter_count
from raychain.models.registry import CONFIG_FOLDER

OWN = sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))


def test_own_names_shadow_none_of_open_clips() -> None:
    shipped = {path.stem for path in (Path(open_clip.__file__).parent / "model_configs").glob("*.json")}
    assert OWN
    assert not shipped & set(OWN)


@pytest.mark.parametrize("name", OWN)
def test_own_configs_build_in_open_clip_by_name(name: str) -> None:
    config = model_config(name)
    assert config == json.loads((CONFIG_FOLDER / f"{name}.json").read_text())
    model = build(name, seed=0, device="meta")
    with torch.device("meta"):
        theirs = open_clip.create_model(name, device="meta")
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize(
    ("size", "vision", "text", "embed_dim"),
    [
        ("T", (192, 12, 3), (256, 4), 512),
        ("C", (256, 12, 4), (320, 5), 512),
        ("S", (384, 12, 6), (384, 6), 512),
        ("M", (512, 12, 8), (448, 7), 512),
        ("B", (768, 12, 12), (512, 8), 512),
        ("BL", (1024, 12, 16), (768, 12), 768),
        ("L", (1024, 24, 16), (768, 12), 512),
    ],
)
def test_vit_family_has_the_papers_sizes(
    size: str, vision: tuple[int, int, int], text: tuple[int, int], embed_dim: int
) -> None:
    model = build(f"CoM-ViT-{size}-16", seed=0, device="meta")
    blocks, words = model.visual.transformer.resblocks, model.transformer.resblocks
    assert (model.visual.conv1.out_channels, len(blocks), blocks[0].attn.num_heads) == vision
    assert (model.token_embedding.embedding_dim, words[0].attn.num_heads) == text
    assert len(words) == 12
    assert model.visual.proj.shape[1] == model.text_projection.shape[1] == embed_dim


def test_model_config_is_a_copy() -> None:
    model_config("CoM-micro-S")["vision_cfg"]["width"] = 1
    assert model_config("CoM-micro-S")["vision_cfg"]["width"] == 64


def test_timm_names_become_image_towers() -> None:
    config = model_config("vit_small_patch16_224")
    assert config == model_config("timm/vit_small_patch16_224")
    assert config["vision_cfg"]["timm_model_name"] == "vit_small_patch16_224"
    assert config["vision_cfg"]["timm_model_pretrained"] is False


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("CoM-ViT-T16", "Did you mean 'CoM-ViT-T-16'"),
        ("com-vit-t-16", "Did you mean 'CoM-ViT-T-16'"),
        ("hf-hub:someone/model", "address of weights"),
        ("local-dir:somewhere", "address of weights"),
        ("roberta-ViT-B-32", "Hugging Face text tower"),
        ("ViT-B-16-SigLIP", "Hugging Face tokenizer"),
        ("coca_ViT-B-32", "CoCa"),
    ],
)
def test_unbuildable_names_are_one_clear_message(name: str, says: str) -> None:
    with pytest.raises(UnknownModelError, match=says) as caught:
        build(name, seed=0)
    assert repr(name) in str(caught.value)
    assert name not in model_names()


@pytest.mark.parametrize("name", ["CoM-micro-S", "CoM-Swin-T", "RN50"])
def test_build_is_deterministic_and_leaves_the_global_random_state(name: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (build(name, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in first.state_dict().items():
        assert not value.is_floating_point() or value.dtype == torch.float32
        assert torch.equal(value, again.state_dict()[key])
    assert not torch.equal(first.token_embedding.weight, other.token_embedding.weight)


def test_build_draws_what_open_clip_would() -> None:
    torch.manual_seed(7)
    theirs = open_clip.create_model("CoM-micro-S").state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in build("CoM-micro-S", seed=7).state_dict().items())


def test_image_size_overrides_the_configs() -> None:
    model = build("CoM-micro-S", seed=0, image_size=48)
    assert model.visual.positional_embedding.shape[0] == 1 + 6 * 6
    assert open_clip.get_model_preprocess_cfg(model)["size"] == (48, 48)
    with pytest.raises(ValueError, match="multiple of 8"):
        build("CoM-micro-S", seed=0, image_size=44)
    with pytest.raises(ValueError, match="open_clip builds for 224 pixels"):
        build("CoM-Swin-T", seed=0, image_size=256, device="meta")


def test_convolutional_towers_take_any_image_size() -> None:
    images = torch.zeros(2, 3, 72, 72)
    assert build("CoM-micro-ConvNeXt", seed=0, image_size=72).encode_image(images).shape == (2, 64)


def test_parameter_count_needs_no_memory_and_is_right() -> None:
    assert parameter_count("CoM-micro-S") == sum(p.numel() for p in build("CoM-micro-S", seed=0).parameters())
    assert parameter_count("CoM-ViT-L-16") > 400e6
