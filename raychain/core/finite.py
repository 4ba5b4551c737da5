"""Whether tensors are finite: a model's in memory, and a weights file's while somebody reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """How many of the tensors hold NaN or infinity, and the first one's name; None if all are finite."""
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    return _described([name for name, value in floats.items() if not _is_finite(value)], len(floats))


def _is_finite(tensor: torch.Tensor) -> bool:
    """The extremes keep a NaN, and are found many times faster than every number is looked at."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


class FiniteScan:
    """Looks for NaN and infinity in a safetensors file while its bytes pass by, whoever reads them and for what.

    Tensors of 32-bit floats are looked at, as stage folders have no others.
    """

    def __init__(self) -> None:
        self._rest, self._header, self._position = b"", -1, 0
        self._tensors: list[tuple[int, int, str]] = []
        """Begin and end in the file, and name, of those that are still to come, the next one last."""
        self._count = 0
        self._bad: list[str] = []

    def feed(self, chunk: bytes) -> None:
        """Takes the file's next bytes. Nothing is found in a file of another kind."""
        data = self._rest + chunk
        if self._header < 0:
            if len(data) < 8:
                self._rest = data
                return
            self._header = 8 + int.from_bytes(data[:8], "little")
        if self._position < self._header:
            if len(data) < self._header:
                self._rest = data
                return
            self._read_header(data[8 : self._header])
            data, self._position = data[self._header :], self._header
        whole = len(data) - len(data) % 4
        self._look(np.frombuffer(data, "<f4", whole // 4))
        self._rest, self._position = data[whole:], self._position + whole

    @property
    def problem(self) -> str | None:
        """How many tensors hold what is not finite, and the first one's name; None if all are finite."""
        return _described(list(dict.fromkeys(self._bad)), self._count)

    def _read_header(self, content: bytes) -> None:
        try:
            entries = json.loads(content)
            found = [(*entry["data_offsets"], name) for name, entry in entries.items() if entry.get("dtype") == "F32"]
        except (ValueError, AttributeError, KeyError, TypeError):
            return
        self._tensors = sorted(((self._header + a, self._header + b, name) for a, b, name in found), reverse=True)
        self._count = len(found)

    def _look(self, values: np.ndarray) -> None:
        begin, end = self._position, self._position + 4 * len(values)
        while self._tensors and self._tensors[-1][0] < end:
            start, stop, name = self._tensors[-1]
            part = values[max(start - begin, 0) // 4 : (min(stop, end) - begin) // 4]
            if part.size and not (np.isfinite(part.min()) and np.isfinite(part.max())):  # both keep a NaN
                self._bad.append(name)
            if stop > end:
                return
            self._tensors.pop()


def _described(bad: list[str], count: int) -> str | None:
    return f"{len(bad)} of {count} tensors are not finite, first {bad[0]}" if bad else None
