"""SigLIP: a sigmoid loss on every pair of a picture and a caption (Zhai et al. 2023, 2303.15343).

B global batch, b local batch, K captions, D features.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F

from raychain.core.dist import gather, rank, rank_slice, world_size
from raychain.paradigms.base import Config, Task
from raychain.paradigms.clip.objective import ImageTextObjective
from raychain.paradigms.clip.paradigm import ImageTextParadigm


class SigLipTask(Task):
    """`task: {paradigm: siglip}`."""

    init_logit_scale: float = math.log(10)
    """Logarithm of the scale that pairs' cosines are multiplied by, at the start of a chain; learned."""
    init_logit_bias: float = -10.0
    """Bias that is added to the scaled cosines, at the start of a chain; learned."""


def sigmoid_loss(
    image_bD: torch.Tensor,
    text_bKD: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    batch: int | None = None,
) -> torch.Tensor:
    """−(1/B) Σ_i Σ_j log σ(z_ij · (scale · x_i·y_j + bias)), z = 1 for pairs and −1 else, averaged over the K captions.

    Features are normalised, `scale` is exp(logit_scale), `batch` is B (absent: all ranks hold as many). Returns this
    rank's part, its pictures against the captions of all ranks; the mean over ranks is the loss of the global batch. On
    one rank with one caption it equals open_clip's SigLipLoss.
    """
    text_all = gather(text_bKD, batch)
    total, first = image_bD.new_zeros(()), rank_slice(len(text_all), rank(), world_size()).start
    own = torch.arange(len(image_bD), device=image_bD.device)
    for k in range(text_bKD.shape[1]):
        logits_bB = scale * image_bD @ text_all[:, k].T + bias
        total = total + F.softplus(logits_bB).sum() - logits_bB[own, own + first].sum()
    return total / text_bKD.shape[1] * world_size() / len(text_all)


class SigLipObjective(ImageTextObjective):
    """The sigmoid loss with a learned scale and bias."""

    def loss(self, task: tuple[torch.Tensor, ...], batch: int) -> torch.Tensor:
        image_bD, text_bKD = task
        return sigmoid_loss(image_bD, text_bKD, self.model.logit_scale.exp(), self.model.logit_bias, batch)

    def report(self) -> dict[str, float]:
        return super().report() | {"logit_bias": float(self.model.logit_bias.detach())}


class SigLip(ImageTextParadigm):
    """open_clip's models with a `logit_bias`, trained with the sigmoid loss."""

    name = "siglip"
    options = SigLipTask
    objective_class: ClassVar[type[ImageTextObjective]] = SigLipObjective
    task: SigLipTask

    def config(self, model: str) -> Config:
        own = {"init_logit_scale": self.task.init_logit_scale, "init_logit_bias": self.task.init_logit_bias}
        return {**super().config(model), **own}
