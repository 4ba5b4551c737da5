"""Stage folders: the model as its paradigm writes it, and what the next stage grows from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from raychain.growth import Moments
from raychain.paradigms.base import Config, Paradigm, plain

PROJECTOR = "projector.safetensors"
OPTIMIZER = "optimizer.safetensors"


def write_artifact(
    folder: Path,
    paradigm: Paradigm,
    model: nn.Module,
    config: Config,
    size: int,
    *,
    projector: nn.Module | None = None,
    moments: Moments | None = None,
) -> dict[str, str]:
    """Writes the model with its configuration, the projector if it has parameters, AdamW's moments if given.

    Returns each file's SHA-256.
    """
    paradigm.save(folder, model, config, size)
    if projector is not None and any(True for _ in projector.parameters()):
        save_file(plain(projector.state_dict()), folder / PROJECTOR)
    if moments is not None:
        tensors = {f"exp_avg/{name}": value for name, value in moments.exp_avg.items()}
        tensors |= {f"exp_avg_sq/{name}": value for name, value in moments.exp_avg_sq.items()}
        save_file(plain(tensors) | {"step": torch.tensor(moments.step)}, folder / OPTIMIZER)
    return {path.name: _sha256(path) for path in sorted(folder.iterdir())}


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
