"""Ranks of a process group and what they exchange. B global batch, b a rank's part; without a group, all of it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


class _Gather(torch.autograd.Function):
    """Joins the blocks of all ranks along dim 0; the gradient of a block is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, batch: int) -> torch.Tensor:
        world = dist.get_world_size()
        blocks = [rank_slice(batch, rank, world) for rank in range(world)]
        ctx.blocks = blocks
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
        return sum_of_block(grad, ctx.blocks), None


SCATTERS = ("nccl",)
"""Backends whose reduce-scatter sends half of what all-reduce does. Gloo's takes longer than its all-reduce."""


def sum_of_block(grad: torch.Tensor, blocks: list[slice]) -> torch.Tensor:
    """The sum over all ranks of this rank's block of `grad`; `blocks` are those of all ranks."""
    own = blocks[dist.get_rank()]
    if dist.get_backend() not in SCATTERS:
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may hold the same tensor elsewhere
        dist.all_reduce(grad)
        return grad[own]
    longest = max(block.stop - block.start for block in blocks)
    padded = grad.contiguous()
    if longest * len(blocks) != len(grad):
        padded = grad.new_zeros((len(blocks), longest, *grad.shape[1:]))
        for place, block in zip(padded, blocks, strict=True):
            place[: block.stop - block.start] = grad[block]
        padded = padded.flatten(0, 1)
    found = grad.new_empty((longest, *grad.shape[1:]))
    _reduce_scatter(found, padded)
    return found[: own.stop - own.start]


_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before 2.14


def rank_slice(size: int, rank: int, world: int, together: int = 1) -> slice:
    """The contiguous block of `size` items that `rank` of `world` takes; sizes differ by at most one.

    Of items that belong `together`, so many in a row, whole groups are taken.
    """
    groups = -(-size // together)
    start, stop = (min(place * groups // world * together, size) for place in (rank, rank + 1))
    return slice(start, stop)


def world_size() -> int:
    """Ranks of the process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank in the process group; 0 without one."""
    return dist.get_rank() if world_size() > 1 else 0


def neighbours(place: str, device: torch.device) -> tuple[int, ...]:
    """The ranks that name the same `place` as this one; every rank calls it."""
    world = world_size()
    if world == 1:
        return (0,)
    own = torch.frombuffer(bytearray(hashlib.sha256(place.encode()).digest()), dtype=torch.uint8).to(device)
    found = own.new_empty((world * len(own),))
    dist.all_gather_into_tensor(found, own)
    return tuple((found.view(world, -1) == own).all(1).nonzero().flatten().tolist())


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
