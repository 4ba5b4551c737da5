"""Pictures with their classes, changed and mixed as training asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raychain.data.pictures import PictureReader
from raychain.paradigms.classify.augment import Changes
from raychain.paradigms.classify.mixing import TOGETHER, Mixing, mix_pairs


@dataclass(frozen=True)
class ClassReader(PictureReader):
    """Batches of `images`, uint8 [n, H, W, 3], `label`, int64 [n], and `seed`, int64 [n]; where pictures are mixed also
    `other` and `share` (`mixing.mix_pairs`).
    """

    changes: Changes = field(default_factory=Changes)
    mixing: Mixing = Mixing()  # noqa: RUF009 - frozen

    @property
    def identity(self) -> Mapping[str, Any]:
        beyond = {"beyond": self.spec.beyond} if self.spec.cropped else {}
        return {**super().identity, **self.changes.identity, **self.mixing.identity, **beyond}

    @property
    def together(self) -> int:
        """See `data.reader.Joining`."""
        return TOGETHER if self.mixing.on else 1

    def changed(self, image: np.ndarray, seed: int) -> np.ndarray:
        return self.changes.apply(image, seed)

    def mirrored(self, seed: int) -> bool:
        return self.changes.mirrored(seed)

    def join(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Pairs mixed, then rectangles erased, in timm's order."""
        found = mix_pairs(columns, self.mixing) if self.mixing.on else dict(columns)
        if self.changes.erase:
            seeds = found["seed"].view(np.uint64)
            for image, seed in zip(found["images"], seeds.tolist(), strict=True):
                self.changes.erased(image, seed)
        return found
