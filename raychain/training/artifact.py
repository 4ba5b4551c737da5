"""Stage folders: what unmodified open_clip loads as `local-dir:PATH`, and what the next stage grows from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from open_clip.model import set_model_preprocess_cfg
from safetensors.torch import load_file, save_file
from torch import nn

from raychain.families.building import build_config, preprocessing_of
from raychain.growth import Moments

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
PROJECTOR = "projector.safetensors"
OPTIMIZER = "optimizer.safetensors"


def write_artifact(
    folder: Path,
    model: nn.Module,
    config: dict[str, Any],
    image_size: int,
    *,
    projector: nn.Module | None = None,
    moments: Moments | None = None,
) -> dict[str, str]:
    """Writes config and weights, the projector if it has parameters, AdamW's moments if given; returns each file's
    SHA-256.
    """
    config = {**config, "vision_cfg": {**config["vision_cfg"], "image_size": image_size}}
    preprocessing = {**preprocessing_of(model), "size": image_size}
    document = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
    save_file(_state(model), folder / WEIGHTS)
    if projector is not None and any(True for _ in projector.parameters()):
        save_file(_state(projector), folder / PROJECTOR)
    if moments is not None:
        tensors = {f"exp_avg/{name}": value for name, value in moments.exp_avg.items()}
        tensors |= {f"exp_avg_sq/{name}": value for name, value in moments.exp_avg_sq.items()}
        save_file(_plain(tensors) | {"step": torch.tensor(moments.step)}, folder / OPTIMIZER)
    return {path.name: _sha256(path) for path in sorted(folder.iterdir())}


def load_model(folder: Path) -> nn.Module:
    """The model of a stage folder, in fp32 on the CPU."""
    document = json.loads((folder / CONFIG).read_text())
    model = build_config(document["model_cfg"], seed=0)
    model.load_state_dict(load_file(folder / WEIGHTS))
    set_model_preprocess_cfg(model, document["preprocess_cfg"])
    return model


def load_moments(folder: Path) -> Moments | None:
    """AdamW's moments of a stage folder, on the CPU; None where it has none."""
    if not (folder / OPTIMIZER).exists():
        return None
    tensors = load_file(folder / OPTIMIZER)
    split: dict[str, dict[str, torch.Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
    step = int(tensors.pop("step"))
    for key, value in tensors.items():
        moment, _, name = key.partition("/")
        split[moment][name] = value
    return Moments(step, **split)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return _plain(module.state_dict())


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
