"""LaCLIP's contrastive loss of a global batch spread over ranks. B global batch, b local, K captions, D features."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from raychain.core.dist import gather, rank, rank_slice, share, world_size


def contrastive_loss(
    image_bD: torch.Tensor, text_bKD: torch.Tensor, scale: torch.Tensor, batch: int | None = None
) -> torch.Tensor:
    """CLIP's symmetric cross-entropy, averaged over the K captions of an image (LaCLIP; docs/method.md).

    Features are normalised, `scale` is exp(logit_scale), `batch` is B (absent: all ranks hold as many). Returns this
    rank's part: its pictures against all captions and its captions against all pictures. The mean over ranks is the
    loss of the global batch, so DDP's averaged gradient is its gradient. With one caption and an even split it equals
    open_clip's ClipLoss(local_loss=True, gather_with_grad=True).
    """
    image_all, text_all = gather(image_bD, batch), gather(text_bKD, batch)
    first = rank_slice(len(image_all), rank(), world_size()).start
    target = torch.arange(len(image_bD), device=image_bD.device) + first
    total = image_bD.new_zeros(())
    for k in range(text_bKD.shape[1]):
        to_text = scale * image_bD @ text_all[:, k].T
        to_image = scale * text_bKD[:, k] @ image_all.T
        total = total + (F.cross_entropy(to_text, target) + F.cross_entropy(to_image, target)) / 2
    return total / text_bKD.shape[1] * share(len(image_bD), batch)
