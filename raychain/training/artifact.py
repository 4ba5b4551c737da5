"""Stage folders: what unmodified open_clip loads as `local-dir:PATH`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from open_clip.model import set_model_preprocess_cfg
from safetensors.torch import load_file, save_file
from torch import nn

from raychain.families.building import build_config
from raychain.training.student import preprocessing_of

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
PROJECTOR = "projector.safetensors"


def write_artifact(
    folder: Path, model: nn.Module, config: dict[str, Any], image_size: int, projector: nn.Module | None = None
) -> dict[str, str]:
    """Writes config, weights and (if it has parameters) projector; returns each file's SHA-256."""
    config = {**config, "vision_cfg": {**config["vision_cfg"], "image_size": image_size}}
    preprocessing = {**preprocessing_of(model), "size": image_size}
    document = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
    save_file(_state(model), folder / WEIGHTS)
    if projector is not None and any(True for _ in projector.parameters()):
        save_file(_state(projector), folder / PROJECTOR)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def load_model(folder: Path) -> nn.Module:
    """The model of a stage folder, in fp32 on the CPU."""
    document = json.loads((folder / CONFIG).read_text())
    model = build_config(document["model_cfg"], seed=0)
    model.load_state_dict(load_file(folder / WEIGHTS))
    set_model_preprocess_cfg(model, document["preprocess_cfg"])
    return model


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
