"""LaCLIP's contrastive loss of a global batch spread over ranks. B global batch, b local, K captions, D features."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from raychain.feed.order import rank_slice


class _Gather(torch.autograd.Function):
    """Joins the blocks of all ranks along dim 0; the gradient of a block is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, batch: int) -> torch.Tensor:
        world = dist.get_world_size()
        blocks = [rank_slice(batch, rank, world) for rank in range(world)]
        ctx.block = blocks[dist.get_rank()]
        longest = max(block.stop - block.start for block in blocks)
        padded = F.pad(local, [0, 0] * (local.ndim - 1) + [0, longest - len(local)])
        joined = local.new_empty((world * longest, *local.shape[1:]))
        dist.all_gather_into_tensor(joined, padded.contiguous())
        if world * longest == batch:
            return joined
        parts = joined.split(longest)
        return torch.cat([part[: block.stop - block.start] for part, block in zip(parts, blocks, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may hold the same tensor elsewhere
        dist.all_reduce(grad)
        return grad[ctx.block], None


def world_size() -> int:
    """Ranks of the process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank in the process group; 0 without one."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(local: torch.Tensor, batch: int | None = None) -> torch.Tensor:
    """[b, …] of every rank joined to [B, …], with gradient; the tensor itself without a process group.

    `batch` is B, of which every rank holds its `rank_slice`; absent: all hold as many.
    """
    world = world_size()
    return _Gather.apply(local, batch or world * len(local)) if world > 1 else local


def share(local: int, batch: int | None) -> float:
    """The factor that turns a rank's mean over its `local` items into its part of the global mean: the mean over ranks
    of `share × mean` is the mean over all `batch` items, however unevenly they are split.
    """
    return local * world_size() / batch if batch else 1.0


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a detached tensor over the ranks."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
        value /= world_size()
    return value


def contrastive_loss(
    image_bD: torch.Tensor, text_bKD: torch.Tensor, scale: torch.Tensor, batch: int | None = None
) -> torch.Tensor:
    """CLIP's symmetric cross-entropy, averaged over the K captions of an image (LaCLIP; `method.md`, "The method").

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
