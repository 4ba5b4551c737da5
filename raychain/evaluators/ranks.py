"""The ranks that measure a model together, and the few exchanges between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from raychain.core.dist import rank, rank_slice, world_size


@dataclass(frozen=True)
class World:
    """The processes that take part in a measurement: all of the process group, or this one alone.

    What measures beside the training of a group is alone, although its process belongs to the group.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def group(cls) -> World:
        """All ranks of the process group; this process alone without one."""
        return cls(rank(), world_size())

    def part(self, count: int) -> slice:
        """The contiguous block of `count` items that is this rank's."""
        return rank_slice(count, self.rank, self.size)

    def join(
        self, parts: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The rows of all ranks [N, D] on `device`, in the order of the ranks.

        `parts` [n, D] are this rank's rows; ranks may have different numbers of rows, or none as long as one rank has
        some. Besides the result at most one copy of this rank's rows is made.
        """
        if self.size == 1:
            return torch.cat(list(parts)).to(device)
        wire = _wire(device)
        shape = torch.tensor([sum(map(len, parts)), max((part.shape[1] for part in parts), default=0)], device=wire)
        shapes = [torch.empty_like(shape) for _ in range(self.size)]
        dist.all_gather(shapes, shape)
        counts = [int(count) for count, _ in shapes]
        rows = torch.empty((sum(counts), max(int(width) for _, width in shapes)), dtype=dtype, device=wire)
        for source, block in enumerate(rows.split(counts)):  # views of `rows`: received in place, without padding
            if source == self.rank and parts:
                torch.cat([part.to(wire) for part in parts], out=block)
            if len(block):
                dist.broadcast(block, source)
        return rows.to(device)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, of the same shape, on the same device."""
        if self.size == 1:
            return values
        device, summed = values.device, values.to(_wire(values.device), copy=True)
        dist.all_reduce(summed)
        return summed.to(device)

    def most(self, value: int) -> int:
        """The largest of the ranks' values."""
        return max(self.total(torch.eye(self.size, dtype=torch.int64)[self.rank] * value))

    def total(self, counts: torch.Tensor) -> list[int]:
        """The sum over the ranks of each integer count."""
        return [int(count) for count in self.sum(counts).tolist()]


def _wire(device: torch.device) -> torch.device:
    """Where tensors must be for the process group: gloo moves them through main memory, NCCL between GPUs."""
    return torch.device("cpu") if dist.get_backend() == "gloo" else device
