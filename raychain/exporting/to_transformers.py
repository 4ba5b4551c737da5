"""Both towers as transformers' CLIPModel, with its tokenizer and image processor."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch

from raychain.core.json import Json
from raychain.exporting.source import RefusedError, Source, compared, loaded

LAYER = (("ln_1.", "layer_norm1."), ("ln_2.", "layer_norm2."), ("mlp.c_fc.", "mlp.fc1."), ("mlp.c_proj.", "mlp.fc2."),
         ("attn.out_proj.", "self_attn.out_proj."))  # fmt: skip
VOCABULARY = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2
"""Merges of CLIP's vocabulary, which follow the file's first line."""


def to_transformers(source: Source, folder: Path) -> dict[str, float]:
    """Writes the folder that `transformers.CLIPModel.from_pretrained` loads, and compares what it does.

    Raises RefusedError for models that CLIPModel is no equal of.
    """
    from transformers import CLIPConfig, CLIPModel

    if "timm_model_name" in source.config["vision_cfg"]:
        raise RefusedError("its image tower is timm's, and CLIPModel has CLIP's vision transformer; --to timm takes it")
    if not isinstance(source.config["vision_cfg"].get("layers", 12), int):
        raise RefusedError("its image tower is CLIP's ResNet, and CLIPModel has its vision transformer")
    tokenizer, bos, eos = _tokenizer(source)
    model: Any = CLIPModel(CLIPConfig(**_config(source, bos, eos)))
    loaded(model, dict(_tensors(source, model.state_dict())))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_processor(source, folder)
    again: Any = CLIPModel.from_pretrained(folder)
    with torch.inference_mode():
        found = again.eval()(input_ids=source.tokens(), pixel_values=source.pictures())
    image, text = (torch.nn.functional.normalize(features, dim=-1) for features in source.encode())
    return {
        "image features": compared(found.image_embeds, image, "image features"),
        "text features": compared(found.text_embeds, text, "text features"),
    }


def _config(source: Source, bos: int, eos: int) -> Json:
    """CLIPConfig's arguments."""
    vision, text = source.config["vision_cfg"], source.config["text_cfg"]
    size = source.pixels
    if size[0] != size[1]:
        raise RefusedError("its pictures are no squares")
    activation = "quick_gelu" if source.config.get("quick_gelu") else "gelu"
    width, text_width = int(vision.get("width", 768)), int(text.get("width", 512))
    return {
        "projection_dim": int(source.config["embed_dim"]),
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision.get("layers", 12),
            "num_attention_heads": width // int(vision.get("head_width", 64)),
            "image_size": size[0],
            "patch_size": vision.get("patch_size", 16),
            "hidden_act": activation,
            "layer_norm_eps": 1e-5,
        },
        "text_config": {
            "hidden_size": text_width,
            "intermediate_size": int(text_width * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "max_position_embeddings": text.get("context_length", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "hidden_act": activation,
            "layer_norm_eps": 1e-5,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": eos,
        },
    }


def _tensors(source: Source, theirs: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under transformers' names, of which `theirs` are all."""
    state = source.model.state_dict()
    text = "text." if "text.positional_embedding" in state else ""
    for name, value in state.items():
        if name.startswith("visual."):
            yield from _vision(name.removeprefix("visual."), value)
        elif name == "logit_scale":
            yield name, value
        elif name == "logit_bias":
            raise RefusedError("it has a logit_bias, which CLIPModel has not")
        else:
            yield from _text(name.removeprefix(text), value)
    for name, value in theirs.items():
        if name.endswith("position_ids"):
            yield name, value


def _vision(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    inside = "vision_model."
    if name.startswith("transformer.resblocks."):
        yield from _block(f"{inside}encoder.layers.", name.removeprefix("transformer.resblocks."), value)
    elif name == "proj":
        yield "visual_projection.weight", value.T.contiguous()
    elif name == "class_embedding":
        yield f"{inside}embeddings.class_embedding", value
    elif name == "positional_embedding":
        yield f"{inside}embeddings.position_embedding.weight", value
    elif name == "conv1.weight":
        yield f"{inside}embeddings.patch_embedding.weight", value
    else:
        yield inside + name.replace("ln_pre.", "pre_layrnorm.").replace("ln_post.", "post_layernorm."), value


def _text(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    inside = "text_model."
    if name.startswith("transformer.resblocks."):
        yield from _block(f"{inside}encoder.layers.", name.removeprefix("transformer.resblocks."), value)
    elif name in ("text_projection", "text_projection.weight"):
        yield "text_projection.weight", value if name.endswith("weight") else value.T.contiguous()
    elif name == "token_embedding.weight":
        yield f"{inside}embeddings.token_embedding.weight", value
    elif name == "positional_embedding":
        yield f"{inside}embeddings.position_embedding.weight", value
    else:
        yield inside + name.replace("ln_final.", "final_layer_norm."), value


def _block(inside: str, name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for ours, theirs in LAYER:
        name = name.replace(ours, theirs)
    layer, _, part = name.partition(".attn.in_proj_")
    if not part:
        yield inside + name, value
        return
    for which, third in zip("qkv", value.chunk(3), strict=True):
        yield f"{inside}{layer}.self_attn.{which}_proj.{part}", third.contiguous()


def _tokenizer(source: Source) -> tuple[Any, int, int]:
    """transformers' CLIPTokenizer of open_clip's own vocabulary, with the ids of the first and the last token."""
    from transformers import CLIPTokenizer

    text = source.config["text_cfg"]
    if text.get("tokenizer_kwargs"):
        raise RefusedError("its tokenizer has options of its own (text_cfg.tokenizer_kwargs)")
    known = open_clip.tokenizer.SimpleTokenizer()
    with gzip.open(VOCABULARY, "rt", encoding="utf-8") as file:
        merges: Any = [tuple(line.split()) for line in file.read().split("\n")[1 : MERGES + 1]]
    bos, eos = known.sot_token_id, known.eot_token_id
    names = {bos: "<|startoftext|>", eos: "<|endoftext|>"}  # as transformers calls what open_clip calls otherwise
    vocabulary = {names.get(number, token): number for token, number in known.encoder.items()}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=text.get("context_length", 77))
    texts = ["a red thing", "Two small things, and  a line: it's 25 %!", "naïve café"]
    mine = known(texts, context_length=text.get("context_length", 77)).tolist()
    for said, given in zip(tokenizer(texts)["input_ids"], mine, strict=True):
        if said != given[: len(said)] or any(given[len(said) :]):
            raise RefusedError("transformers' tokenizer parts texts differently")
    return tokenizer, bos, eos


def _write_processor(source: Source, folder: Path) -> None:
    """preprocessor_config.json of CLIPImageProcessor: the shorter side to the model's size, and the centre of that."""
    preprocessing, size = source.preprocessing, source.pixels[0]
    modes = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
    document = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": modes.get(str(preprocessing.get("interpolation") or "bicubic"), 3),
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(document, indent=2) + "\n")
