"""CLIP's objective on open_clip's models. b local batch, K captions, L context length, D features."""

from __future__ import annotations

import math

import torch
from torch import nn

from raychain.core.attention import unfused_on_cpus
from raychain.models.building import preprocessing_of
from raychain.paradigms.clip.loss import contrastive_loss
from raychain.paradigms.objective import Columns, Encoded, Objective, Projector

MAX_LOGIT_SCALE = math.log(100)


class ImageTextObjective(Objective):
    """Two towers that meet in one embedding space; subclasses have the loss.

    Batches have `images`, uint8 [b, H, W, 3], and `tokens`, int64 [b, K, L]. Features are [b, D] and [b, K, D].
    """

    feature_names = ("image", "text")
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, projector: Projector | None = None) -> None:
        super().__init__(model, projector)
        preprocessing = preprocessing_of(model)
        self.register_buffer("mean", 255 * torch.tensor(preprocessing["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(preprocessing["std"]).view(1, 3, 1, 1), persistent=False)

    def encode(self, part: Columns) -> Encoded:
        images, tokens = part["images"], part["tokens"]
        with unfused_on_cpus(images.device):
            pixels = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
            image = self.model.encode_image(pixels, normalize=True).float()
            text = self.model.encode_text(tokens.flatten(0, 1), normalize=True).float()
        towers = image, text.unflatten(0, tokens.shape[:2])
        return Encoded(towers, towers)

    def after_step(self) -> None:
        self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def report(self) -> dict[str, float]:
        return {"logit_scale": float(self.model.logit_scale.detach().exp())}


class ClipObjective(ImageTextObjective):
    """The contrastive loss of a global batch (`paradigms.clip.loss`). A model's `logit_bias` has no part in it."""

    def __init__(self, model: nn.Module, projector: Projector | None = None) -> None:
        super().__init__(model, projector)
        if self.model.logit_bias is not None:
            self.model.logit_bias.requires_grad_(False)  # workers would wait for each other's gradients of it

    def loss(self, task: tuple[torch.Tensor, ...], batch: int) -> torch.Tensor:
        image_bD, text_bKD = task
        return contrastive_loss(image_bD, text_bKD, self.model.logit_scale.exp(), batch)
