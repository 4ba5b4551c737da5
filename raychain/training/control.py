"""How rank 0's wishes (stop, save) reach all ranks at the same step without anyone waiting."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntFlag
from typing import Any

import torch
import torch.distributed as dist

from raychain.core.dist import world_size


class Wish(IntFlag):
    """What rank 0 wants done after a step; FAIL: a state that it was to save is not finite."""

    NONE = 0
    SAVE = 1
    STOP = 2
    FAIL = 4


class Control:
    """Exchanged once a step: returns the wishes rank 0 had one step ago, the same on every rank."""

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._pending: dist.Work | None = None

    def exchange(self, wishes: Callable[[], Wish]) -> Wish:
        """`wishes` is asked on rank 0 only."""
        if self._group is None:
            return wishes()
        agreed = Wish.NONE
        if self._pending is not None:
            self._pending.wait()
            agreed = Wish(int(self._flag))
        self._flag = torch.tensor([int(wishes()) if dist.get_rank() == 0 else 0])
        self._pending = dist.broadcast(self._flag, 0, group=self._group, async_op=True)
        return agreed
