"""LaCLIP's contrastive loss of a global batch spread over ranks. B global batch, b local, K captions, D features."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


class _Gather(torch.autograd.Function):
    """Joins equal blocks of all ranks along dim 0; the gradient of a block is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        ctx.block = slice(dist.get_rank() * len(local), (dist.get_rank() + 1) * len(local))
        joined = local.new_empty((dist.get_world_size() * len(local), *local.shape[1:]))
        dist.all_gather_into_tensor(joined, local.contiguous())
        return joined

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may hold the same tensor elsewhere
        dist.all_reduce(grad)
        return grad[ctx.block]


def world_size() -> int:
    """Ranks of the process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(local: torch.Tensor) -> torch.Tensor:
    """[b, …] of every rank joined to [B, …], with gradient; the tensor itself without a process group."""
    return _Gather.apply(local) if world_size() > 1 else local


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a detached tensor over the ranks."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
        value /= world_size()
    return value


def contrastive_loss(image_bD: torch.Tensor, text_bKD: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross-entropy, averaged over the K captions of an image (LaCLIP; `method.md`, "The method").

    Features are normalised, `scale` is exp(logit_scale). Returns this rank's part: its pictures against all captions
    and its captions against all pictures. The mean over ranks is the loss of the global batch, so DDP's averaged
    gradient is its gradient. With one caption it equals open_clip's ClipLoss(local_loss=True, gather_with_grad=True).
    """
    image_all, text_all = gather(image_bD), gather(text_bKD)
    rank = dist.get_rank() if world_size() > 1 else 0
    target = torch.arange(len(image_bD), device=image_bD.device) + rank * len(image_bD)
    total = image_bD.new_zeros(())
    for k in range(text_bKD.shape[1]):
        to_text = scale * image_bD @ text_all[:, k].T
        to_image = scale * text_bKD[:, k] @ image_all.T
        total = total + (F.cross_entropy(to_text, target) + F.cross_entropy(to_image, target)) / 2
    return total / text_bKD.shape[1]
