"""The image tower as a timm model, whose classifier is the projection into the embedding space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import JsonValue

from raychain.exporting.source import RefusedError, Source, compared, loaded
from raychain.models.timm_checkpoints import TimmCheckpoint, build_timm, write_timm

BASES = {False: "vit_base_patch16_clip_224", True: "vit_base_patch16_clip_quickgelu_224"}
"""timm's own CLIP towers, by whether their activation is QuickGELU; sizes are given beside."""
NAMES = (
    ("conv1.", "patch_embed.proj."),
    ("transformer.resblocks.", "blocks."),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    ("ln_1.", "norm1."),
    ("ln_2.", "norm2."),
    ("attn.in_proj_", "attn.qkv."),
    ("attn.out_proj.", "attn.proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("ls_1.", "ls1."),
    ("ls_2.", "ls2."),
)


def to_timm(source: Source, folder: Path) -> dict[str, float]:
    """Writes the folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads, and compares what it does.

    Raises RefusedError for towers that timm has no equal of.
    """
    checkpoint = _of_timm(source) if "timm_model_name" in source.config["vision_cfg"] else _of_open_clip(source)
    write_timm(folder, checkpoint)
    again: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)  # type: ignore[attr-defined,unused-ignore]
    with torch.inference_mode():
        found = again.eval()(source.pictures())
    return {"image features": compared(found, source.encode()[0], "image features")}


def _of_timm(source: Source) -> TimmCheckpoint:
    """A tower that is timm's already."""
    vision, state = source.config["vision_cfg"], source.model.visual.state_dict()
    name = vision["timm_model_name"]
    if not timm.model_entrypoint(name).__module__.startswith("timm."):
        raise RefusedError(f"{name} is a model of raychain's own, which unmodified timm does not know")
    proj = state.pop("head.proj.weight", None)
    bias = state.pop("head.proj.bias", None)
    if proj is None or any(key.startswith("head.") for key in state):
        raise RefusedError(f"its head is {vision.get('timm_proj')!r}, and timm's classifiers are linear")
    options: dict[str, JsonValue] = {"num_classes": len(proj)}
    if vision.get("timm_pool"):
        options["global_pool"] = vision["timm_pool"]
    if (size := source.pixels) != _own_size(name):
        options["img_size"] = size[0] if size[0] == size[1] else list(size)
    model = _built(name, options)
    head = model.default_cfg["classifier"]
    tensors = {key.removeprefix("trunk."): value for key, value in state.items()}
    tensors |= {f"{head}.weight": proj, f"{head}.bias": torch.zeros(len(proj)) if bias is None else bias}
    loaded(model, tensors)
    return TimmCheckpoint(model, name, options, _seen(source, head))


def _of_open_clip(source: Source) -> TimmCheckpoint:
    """open_clip's own vision transformer, which timm has as that of its CLIP models."""
    vision = source.config["vision_cfg"]
    if not isinstance(vision.get("layers", 12), int):
        raise RefusedError("it is CLIP's ResNet, which timm has in other forms only")
    width = int(vision.get("width", 768))
    ratio = float(vision.get("mlp_ratio", 4.0))
    size = source.pixels
    options: dict[str, JsonValue] = {
        "num_classes": int(source.config["embed_dim"]),
        "img_size": size[0] if size[0] == size[1] else list(size),
        "patch_size": vision.get("patch_size", 16),
        "embed_dim": width,
        "depth": vision.get("layers", 12),
        "num_heads": width // int(vision.get("head_width", 64)),
        "mlp_ratio": ratio,
    }
    name = BASES[bool(source.config.get("quick_gelu"))]
    if vision.get("ls_init_value") is not None:
        options["init_values"] = vision["ls_init_value"]
    model = _built(name, options)
    tensors: dict[str, torch.Tensor] = {}
    for key, value in source.model.visual.state_dict().items():
        for theirs, ours in NAMES:
            key = key.replace(theirs, ours)
        tensors[key] = value
    if "proj" not in tensors or "class_embedding" not in tensors:
        raise RefusedError("it has no projection or no class token")
    tensors["head.weight"] = tensors.pop("proj").T
    tensors["head.bias"] = torch.zeros(len(tensors["head.weight"]))
    tensors["cls_token"] = tensors.pop("class_embedding")[None, None]
    tensors["pos_embed"] = tensors.pop("positional_embedding")[None]
    loaded(model, tensors)
    return TimmCheckpoint(model, name, options, _seen(source, "head"))


def _built(name: str, options: dict[str, JsonValue]) -> Any:
    try:
        return build_timm(name, options, seed=0)
    except ValueError as error:
        raise RefusedError(str(error)) from None


def _own_size(name: str) -> tuple[int, int]:
    size = timm.get_pretrained_cfg(name).input_size  # type: ignore[attr-defined,union-attr,unused-ignore]
    return size[-2], size[-1]


def _seen(source: Source, classifier: str) -> dict[str, JsonValue]:
    """How timm is to prepare pictures."""
    preprocessing: Mapping[str, Any] = source.preprocessing
    return {
        "input_size": [3, *source.pixels],
        "mean": list(preprocessing["mean"]),
        "std": list(preprocessing["std"]),
        "interpolation": str(preprocessing.get("interpolation") or "bicubic"),
        "crop_pct": 1.0,
        "crop_mode": "center",
        "fixed_input_size": True,
        "classifier": classifier,
    }
