"""Reading checkpoints of open_clip models: a folder of open_clip's, a safetensors file, or a .pt file."""

import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.model import convert_to_custom_text_state_dict, get_model_preprocess_cfg, set_model_preprocess_cfg
from safetensors.torch import load_file

from raychain.core.finite import not_finite
from raychain.core.json import Json
from raychain.models.building import build_config, encode_one
from raychain.models.configs import ConfigError, ModelConfig, check_config, check_preprocessing, read_json
from raychain.models.registry import UnknownModelError, model_config, refused
from raychain.models.tokenizing import check_tokenizer

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
)
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_PREFIXES = ("module.", "_orig_mod.")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""The keys under which training scripts keep a model's tensors."""
_LONGEST_HEADER = 2**24
"""Bytes of the longest header of a safetensors file; the thousands of tensors of the largest models take a few %."""


class CheckpointError(ValueError):
    """A path that holds no checkpoint of the model it should be."""


@dataclass(frozen=True)
class Checkpoint:
    """A model read from a file: in fp32 on the CPU, with its open_clip `model_cfg`."""

    model: Any
    config: ModelConfig


def read_checkpoint(path: str | Path, architecture: str | None = None, config: Json | None = None) -> Checkpoint:
    """The model kept at `path`.

    `path` is a folder with open_clip_config.json and weights (open_clip's `local-dir:`, a stage folder), or a weights
    file: `.safetensors`, or what `torch.load(weights_only=True)` reads, with the tensors at the top or under
    `state_dict`, `model_state_dict` or `model`, with or without the `module.` of DDP and of torch's averages before
    the names. `architecture` is the model's name, needed for a file that has no open_clip_config.json beside it;
    `config` is its `model_cfg` where that is not the one it is known for. Nothing is unpickled that could run code, and
    nothing is downloaded, whatever the config asks for. Config, names, shapes and types are compared before memory is
    taken for the model.

    Raises CheckpointError saying what is wrong with the file, UnknownModelError for an unknown architecture and for a
    config whose model would need a download.
    """
    path = existing(path)
    folder = path if path.is_dir() else path.parent
    weights = weights_in(path) if path.is_dir() else path
    document = _document(folder) if architecture is None else {}
    if config is None:
        config = model_config(architecture) if architecture is not None else document.get("model_cfg")
    if config is None:
        where = "the folder has no" if path.is_dir() else "there is no"
        raise CheckpointError(f"{path} does not say which model it is: {where} {CONFIG}; name its architecture")
    which = architecture or f"the model of its {CONFIG}"
    shapes = _meta_model(config, which if architecture else str(folder / CONFIG))
    tensors = fitting(tensors_of(weights), shapes, f"{weights} is not {which}")
    if (problem := not_finite(tensors)) is not None:
        raise CheckpointError(f"{weights} is of no use: {problem}")
    model: Any = build_config(config, seed=0)
    model.load_state_dict(tensors)
    if "preprocess_cfg" in document:
        given = {key: value for key, value in document["preprocess_cfg"].items() if value is not None}
        own = get_model_preprocess_cfg(model)
        set_model_preprocess_cfg(model, {**own, **given, "size": own["size"]})  # as open_clip: the size is the model's
    return Checkpoint(model, config)


def config_beside(path: Path) -> Json | None:
    """The `model_cfg` in the open_clip_config.json of a folder, or beside a weights file; None where there is none.

    Raises CheckpointError and UnknownModelError as `read_checkpoint` does.
    """
    path = existing(path)
    return _document(path if path.is_dir() else path.parent).get("model_cfg")


def existing(path: str | Path) -> Path:
    """`path`, if it is a folder or a regular file. Raises CheckpointError."""
    try:
        path = Path(path).expanduser()
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        if not path.is_dir() and not path.is_file():
            raise CheckpointError(f"{path} is neither a folder nor a regular file")
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return path


def _document(folder: Path) -> ModelConfig:
    """The checked content of open_clip_config.json; empty where there is none."""
    path = folder / CONFIG
    if not path.exists():
        return {}
    try:
        document = read_json(path)
        config = document.get("model_cfg") if isinstance(document, dict) else None
        if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
            raise CheckpointError(f"{path} has no model_cfg with embed_dim, vision_cfg and text_cfg")
        if (refusal := refused(str(path), config)) is not None:
            raise UnknownModelError(refusal)
        check_config(config)
        if "preprocess_cfg" in document:
            check_preprocessing(document["preprocess_cfg"])
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    assert isinstance(document, dict)
    return document


def _meta_model(config: ModelConfig, which: str) -> dict[str, torch.Tensor]:
    """Names, shapes and types of the config's model, which is known to encode pictures and captions."""
    try:
        model = build_config(config, seed=0, device="meta")
        for tower in ("image", "text"):
            encode_one(model.eval(), tower, config["embed_dim"])
        check_tokenizer(config)
    except ValueError as error:
        raise CheckpointError(f"{which} is no model that can be built: {error}") from error
    return model.state_dict()


def weights_in(folder: Path) -> Path:
    """The weights file of a folder. Raises CheckpointError where there is none, or more than one to choose from."""
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from None
    for name in WEIGHTS:
        if folder / name in found:
            return folder / name
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:5]) or "none"
        raise CheckpointError(f"{folder} should hold {WEIGHTS[0]} or one weights file; found: {names}")
    return found[0]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Names, stripped of wrappers' prefixes, to the file's tensors as they are. Raises CheckpointError."""
    try:
        content = _content(path)
    except CheckpointError:
        raise
    except Exception as error:  # a file's bytes may be anything, and each reader has errors of its own for that
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as weights alone (tensors and plain values): {reason}") from error
    if isinstance(content, dict):
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path} holds no state dict: names and tensors at the top or under 'state_dict'")
    if other := [name for name, value in content.items() if not isinstance(value, torch.Tensor)]:
        raise CheckpointError(
            f"{path} holds no state dict, names and tensors at the top or under 'state_dict': {other[0][:60]!r} is no "
            f"tensor, its keys are {', '.join(list(content)[:8])[:200]}"
        )
    if all(name.startswith("module.") for name in content if name != "n_averaged"):  # torch's AveragedModel counts
        content.pop("n_averaged", None)
    for prefix in _PREFIXES:
        if content and all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    return content


def _content(path: Path) -> Any:
    """The whole content of a weights file. Raises whatever its reader does."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _LONGEST_HEADER:
            raise CheckpointError(f"{path} is no safetensors file: its header would have {header:,} bytes")
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise CheckpointError(
                f"{path} unpacks to {unpacked:,} bytes, more than it has: torch.save does not compress; save it again"
            )
    with warnings.catch_warnings(action="ignore"):  # of TorchScript archives, which are refused below
        return torch.load(path, map_location="cpu", weights_only=True)


def fitting(
    tensors: dict[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], problem: str
) -> dict[str, torch.Tensor]:
    """The tensors in fp32 under the names of the model; CheckpointError, which begins with `problem`, if they are not
    the model's.
    """
    if "text.positional_embedding" in wanted and "positional_embedding" in tensors:
        tensors = convert_to_custom_text_state_dict(tensors)
    for name, model in wanted.items():
        given, shape = tensors.get(name), tuple(model.shape)
        if given is None:
            raise CheckpointError(f"{problem}: {name} is missing, the model's has shape {shape}")
        if name in ("logit_scale", "logit_bias") and not given.is_nested and given.numel() == 1:
            tensors[name] = given = given.reshape(shape)
        if given.layout != torch.strided or given.is_nested or given.is_quantized or given.device.type != "cpu":
            raise CheckpointError(f"{problem}: {name} is not kept as plain numbers (it is sparse, quantised or empty)")
        if tuple(given.shape) != shape:
            raise CheckpointError(f"{problem}: {name} has shape {tuple(given.shape)}, the model's has shape {shape}")
        if given.is_complex() or given.is_floating_point() != model.is_floating_point():
            raise CheckpointError(f"{problem}: {name} is {_type(given)}, the model's is {_type(model)}")
    for name in tensors:
        if name not in wanted:
            raise CheckpointError(f"{problem}: the model has no {name[:200]}")
    try:
        return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    except (RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"{problem}: its numbers cannot be read ({error})") from None


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
