"""Checkpoints of plain timm models, in the folders that `timm.create_model("local-dir:…")` loads."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from pydantic import BaseModel, Field, JsonValue, PositiveInt, ValidationError
from safetensors.torch import save_file
from timm.data import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from raychain.core.finite import not_finite
from raychain.core.json import Json
from raychain.models.building import initialised
from raychain.models.checkpoints import CONFIG as OPEN_CLIP_CONFIG
from raychain.models.checkpoints import CheckpointError, existing, fitting, tensors_of, weights_in
from raychain.models.configs import ConfigError, read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
OPTIONS = ("in_chans", "img_size", "num_classes", "global_pool", "class_token", "reg_tokens", "init_values", "depth",
           "embed_dim", "dims", "num_heads", "window_size", "patch_size", "depths", "mlp_ratio", "qkv_bias",
           "dynamic_img_size", "dynamic_img_pad", "drop_rate", "drop_path_rate")  # fmt: skip
"""Arguments of `timm.create_model` that a config may give; none of them makes it load or run anything."""
KEPT = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_size", "label_names")
"""What a `pretrained_cfg` says of pictures and classes."""


@dataclass(frozen=True)
class TimmCheckpoint:
    """A timm model read from a file, in fp32 on the CPU: how `timm.create_model` makes it, and how it sees pictures."""

    model: nn.Module
    architecture: str
    options: dict[str, JsonValue]
    preprocessing: dict[str, JsonValue]

    @property
    def seen(self) -> Json:
        """How timm's evaluation prepares pictures, as an open_clip `preprocess_cfg` with `crop_pct` says it.

        Raises CheckpointError for a `pretrained_cfg` that is none.
        """
        try:
            own = _Seen.model_validate({name: v for name, v in self.preprocessing.items() if v is not None})
        except ValidationError as error:
            [first, *_] = error.errors(include_url=False)
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"pretrained_cfg.{where} is {first['input']!r}: {first['msg']}") from None
        mode = "shortest" if own.crop_mode == "center" else own.crop_mode
        return {**own.model_dump(), "size": self.options.get("img_size") or own.input_size[1:], "resize_mode": mode}


class _Seen(BaseModel):
    """A `pretrained_cfg` as far as it tells how pictures are prepared, with timm's defaults."""

    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float = Field(DEFAULT_CROP_PCT, gt=0)
    crop_mode: str = "center"
    input_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (3, 224, 224)


def is_timm(path: str | Path, architecture: str | None = None) -> bool:
    """Whether what is at `path` is a plain timm model: a folder with timm's config.json, or a file of weights without
    open_clip's towers beside the name of a timm model.
    """
    path = Path(path)
    if path.is_dir():
        if (path / OPEN_CLIP_CONFIG).exists() or not (path / CONFIG).is_file():
            return False
        try:
            document = read_json(path / CONFIG)
        except ConfigError:
            return False
        return isinstance(document, dict) and isinstance(document.get("architecture"), str)
    if architecture is None or not timm.is_model(architecture) or not path.is_file():
        return False
    try:
        names = tensors_of(path)
    except CheckpointError:
        return False
    return not any(name.startswith(("visual.", "text.", "logit_scale", "transformer.")) for name in names)


def build_timm(
    architecture: str, options: dict[str, JsonValue], *, seed: int, device: str | torch.device = "cpu"
) -> nn.Module:
    """A freshly initialised fp32 timm model. Raises ValueError for what timm cannot make of the options."""
    if not timm.is_model(architecture):
        raise ValueError(f"{architecture!r} is no model of timm's")
    said, make = io.StringIO(), cast(Callable[..., nn.Module], timm.create_model)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            return initialised(lambda: make(architecture, pretrained=False, **options), seed=seed, device=device)
    except Exception as error:  # a constructor may raise anything for options that are not its own
        line = str(error).splitlines()[0][:300] if str(error) else ""
        raise ValueError(f"timm cannot build {architecture} with {options}: {type(error).__name__} {line}") from None


def read_timm(path: str | Path, architecture: str | None = None) -> TimmCheckpoint:
    """The timm model at `path`: a folder as timm saves it, or a weights file of the model `architecture`.

    Raises CheckpointError that says what is wrong with it. Nothing is unpickled that could run code, and nothing is
    downloaded.
    """
    path = existing(path)
    options: dict[str, JsonValue] = {}
    preprocessing: dict[str, JsonValue] = {}
    if path.is_dir():
        architecture, options, preprocessing = _document(path / CONFIG)
    weights = weights_in(path) if path.is_dir() else path
    tensors = tensors_of(weights)
    assert architecture is not None, "is_timm"
    try:
        if not path.is_dir():
            options, preprocessing = _guessed(architecture, tensors)
        shapes = build_timm(architecture, options, seed=0, device="meta").state_dict()
        tensors = fitting(tensors, shapes, f"{weights} is not {architecture}")
        model = build_timm(architecture, options, seed=0)
    except ValueError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(str(error)) from None
    if (problem := not_finite(tensors)) is not None:
        raise CheckpointError(f"{weights} is of no use: {problem}")
    model.load_state_dict(tensors)
    return TimmCheckpoint(model, architecture, options, preprocessing)


def write_timm(folder: Path, checkpoint: TimmCheckpoint) -> None:
    """Writes the folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads."""
    others = {name: value for name, value in checkpoint.options.items() if name != "num_classes"}
    document = {
        "architecture": checkpoint.architecture,
        "num_classes": checkpoint.options.get("num_classes", 1000),
        "model_args": others,
        "pretrained_cfg": checkpoint.preprocessing,
    }
    (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
    tensors = {name: value.contiguous() for name, value in checkpoint.model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _document(path: Path) -> tuple[str, dict[str, JsonValue], dict[str, JsonValue]]:
    """Architecture, options and preprocessing of timm's config.json. Raises CheckpointError."""
    try:
        document = read_json(path)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    options = document.get("model_args") or {}
    preprocessing = document.get("pretrained_cfg") or {}
    if not isinstance(options, dict) or not isinstance(preprocessing, dict):
        raise CheckpointError(f"{path}: model_args and pretrained_cfg are mappings")
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise CheckpointError(f"{path}: model_args.{unknown[0]} is none of {', '.join(OPTIONS)}")
    if "num_classes" in document:
        options = {"num_classes": document["num_classes"], **options}
    return document["architecture"], options, {key: preprocessing[key] for key in KEPT if key in preprocessing}


def _guessed(architecture: str, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, JsonValue], dict[str, JsonValue]]:
    """Options and preprocessing of a weights file: the number of classes by the size of the classifier's bias, none
    without a classifier, and timm's preprocessing for the architecture.
    """
    model: Any = build_timm(architecture, {}, seed=0, device="meta")
    name = model.default_cfg.get("classifier")
    names = [name] if isinstance(name, str) else list(name or ())
    biases = [tensors[f"{n}.bias"] for n in names if f"{n}.bias" in tensors]
    preprocessing: dict[str, JsonValue] = json.loads(json.dumps(model.pretrained_cfg, default=str))
    return {"num_classes": len(biases[0]) if biases else 0}, {key: preprocessing.get(key) for key in KEPT}
