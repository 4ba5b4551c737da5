"""The few exchanges between ranks that evaluation needs; without a process group each is the identity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from raychain.core.dist import rank as rank
from raychain.core.dist import world_size


def join(parts: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The rows of all ranks [N, D] on `device`, in the order of the ranks.

    `parts` [n, D] are this rank's rows; ranks may have different numbers of rows, or none as long as one rank has some.
    Besides the result at most one copy of this rank's rows is made.
    """
    if world_size() == 1:
        return torch.cat(list(parts)).to(device)
    wire = _wire(device)
    shape = torch.tensor([sum(map(len, parts)), max((part.shape[1] for part in parts), default=0)], device=wire)
    shapes = [torch.empty_like(shape) for _ in range(world_size())]
    dist.all_gather(shapes, shape)
    counts = [int(count) for count, _ in shapes]
    rows = torch.empty((sum(counts), max(int(width) for _, width in shapes)), dtype=dtype, device=wire)
    for source, block in enumerate(rows.split(counts)):  # views of `rows`: received in place, without padding
        if source == rank() and parts:
            torch.cat([part.to(wire) for part in parts], out=block)
        if len(block):
            dist.broadcast(block, source)
    return rows.to(device)


def total(counts: torch.Tensor) -> list[int]:
    """The sum over ranks of each integer count."""
    if world_size() > 1:
        counts = counts.to(_wire(counts.device))
        dist.all_reduce(counts)
    return [int(count) for count in counts.tolist()]


def _wire(device: torch.device) -> torch.device:
    """Where tensors must be for the process group: gloo moves them through main memory, NCCL between GPUs."""
    return torch.device("cpu") if dist.get_backend() == "gloo" else device
