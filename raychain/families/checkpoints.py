"""Reading checkpoints of open_clip models: a folder of open_clip's, a safetensors file, or a .pt file."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.model import convert_to_custom_text_state_dict, get_model_preprocess_cfg, set_model_preprocess_cfg
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from raychain.families.building import build_config
from raychain.families.registry import UnknownModelError, model_config, refused

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
)
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_PREFIXES = ("module.", "_orig_mod.")


class CheckpointError(ValueError):
    """A path that holds no checkpoint of the model it should be."""


@dataclass(frozen=True)
class Checkpoint:
    """A model read from a file: in fp32 on the CPU, with its open_clip `model_cfg`."""

    model: Any
    config: dict[str, Any]


def read_checkpoint(path: str | Path, architecture: str | None = None) -> Checkpoint:
    """The model kept at `path`.

    `path` is a folder with open_clip_config.json and weights (open_clip's `local-dir:`, a stage folder), or a weights
    file: `.safetensors`, or what `torch.load(weights_only=True)` reads, with the tensors at the top or under
    `state_dict`, with or without DDP's `module.` before the names. `architecture` is the model's name, needed for a
    file that has no open_clip_config.json beside it. Nothing is unpickled that could run code.

    Raises CheckpointError saying what is wrong with the file, UnknownModelError for an unknown architecture.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    folder = path if path.is_dir() else path.parent
    weights = _weights_in(path) if path.is_dir() else path
    document = _document(folder) if architecture is None else {}
    config = model_config(architecture) if architecture is not None else document.get("model_cfg")
    if config is None:
        where = "the folder has no" if path.is_dir() else "there is no"
        raise CheckpointError(f"{path} does not say which model it is: {where} {CONFIG}; name its architecture")
    tensors = _tensors(weights)
    model: Any = build_config(config, seed=0)
    if hasattr(model, "text") and "positional_embedding" in tensors:
        tensors = convert_to_custom_text_state_dict(tensors)
    for name in ("logit_scale", "logit_bias"):
        if name in tensors and getattr(model, name, None) is not None:
            tensors[name] = tensors[name].reshape(getattr(model, name).shape)
    _load(model, tensors, weights, architecture)
    if "preprocess_cfg" in document:
        set_model_preprocess_cfg(model, {**get_model_preprocess_cfg(model), **document["preprocess_cfg"]})
    return Checkpoint(model, config)


def _document(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    config = document.get("model_cfg") if isinstance(document, dict) else None
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        raise CheckpointError(f"{path} has no model_cfg with embed_dim, vision_cfg and text_cfg")
    if (refusal := refused(str(path), config)) is not None:
        raise UnknownModelError(refusal)
    return document


def _weights_in(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"{folder} should hold {WEIGHTS[0]} or one weights file; found: {names}")
    return found[0]


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Names, stripped of wrappers' prefixes, to fp32 tensors."""
    try:
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as weights alone (tensors and plain values): {reason}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no state dict: names and tensors at the top or under 'state_dict'")
    for prefix in _PREFIXES:
        if content and all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in content.items()}


def _load(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path, architecture: str | None) -> None:
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    which = architecture or f"the model of its {CONFIG}"
    for name, shape in wanted.items():
        given = tuple(tensors[name].shape) if name in tensors else None
        if given != shape:
            found = "is missing" if given is None else f"has shape {given}"
            raise CheckpointError(f"{path} is not {which}: {name} {found}, the model's has shape {shape}")
    for name in tensors:
        if name not in wanted:
            raise CheckpointError(f"{path} is not {which}: the model has no {name}")
    model.load_state_dict(tensors)
