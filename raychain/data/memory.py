"""Memory for batches that is used again: the kernel takes as long to hand out fresh pages as copying into them does."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np

KEPT = 8
"""Pieces kept for later batches: as many as a loader has ready, and some in use."""
LEAST = 2**20
"""Bytes below which memory costs nothing."""


class Recycled:
    """Arrays of bytes whose memory comes back when neither they nor anything made of them is in use."""

    def __init__(self) -> None:
        self._free: deque[bytearray] = deque(maxlen=KEPT)

    def empty(self, shape: Sequence[int]) -> np.ndarray:
        """uint8 of that shape, with anything in it."""
        size = math.prod(shape)
        if size < LEAST:
            return np.empty(shape, np.uint8)
        memory = self._taken(size)
        # views hold this array, and not what it is of, as that is no array: so it is there as long as any of them
        whole = np.frombuffer(memory, np.uint8, size)
        weakref.finalize(whole, self._free.append, memory).atexit = False
        return whole.reshape(shape)

    def _taken(self, size: int) -> bytearray:
        """A piece that is large enough and not much larger."""
        for _ in range(len(self._free)):
            try:
                memory = self._free.popleft()
            except IndexError:  # another thread took it
                break
            if size <= len(memory) <= 2 * size:
                return memory
        return bytearray(size)
