"""What DDP wraps: the model with its projector. b local batch, K captions, L context length, D features."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from raychain.objectives.distillation import Projector


def preprocessing_of(model: nn.Module) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` of a model: size, mean and std of its pictures, interpolation."""
    return dict(cast(Any, model.visual).preprocess_cfg)


class Features(NamedTuple):
    """Normalised features of both towers, and exp(logit_scale)."""

    image: torch.Tensor
    """[b, D]"""
    text: torch.Tensor
    """[b, K, D]"""
    scale: torch.Tensor
    projected: tuple[torch.Tensor, torch.Tensor] | None
    """Image and text features in the teacher's space."""


class Student(nn.Module):
    """An open_clip model, and the projector to its teacher's features if it has a teacher.

    With `micro_batch` activations are held for that many pictures and their captions at a time: every part is run
    again when its gradient is due, while the features, and so the contrastive loss, are those of the whole batch. This
    is GradCache (Gao et al., 2021) on torch's activation checkpointing.
    """

    model: Any
    """The open_clip model."""
    micro_batch: int | None = None
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, projector: Projector | None = None) -> None:
        super().__init__()
        self.model = model
        self.projector = projector
        preprocessing = preprocessing_of(model)
        self.register_buffer("mean", 255 * torch.tensor(preprocessing["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(preprocessing["std"]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> Features:
        """uint8 [b, H, W, 3] pictures and int64 [b, K, L] tokens to features."""
        size = min(self.micro_batch or len(images), len(images))
        parts = zip(images.split(size), tokens.split(size), strict=True)
        if size < len(images) and torch.is_grad_enabled():
            encoded = [checkpoint(self._encode, *part, use_reentrant=False) for part in parts]
        else:
            encoded = [self._encode(*part) for part in parts]
        image, text = (torch.cat(tower) if len(tower) > 1 else tower[0] for tower in zip(*encoded, strict=True))
        projected = self.projector(image, text) if self.projector is not None else None
        return Features(image, text, self.model.logit_scale.exp(), projected)

    def _encode(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with _attention(images.device):
            pixels = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
            image = self.model.encode_image(pixels, normalize=True).float()
            text = self.model.encode_text(tokens.flatten(0, 1), normalize=True).float()
        return image, text.unflatten(0, tokens.shape[:2])


def _attention(device: torch.device) -> AbstractContextManager[None]:
    # On CPUs the fused bf16 attention is slow: a CoM-micro-L step took 0.85 s with it, 0.57 s without (one thread).
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
