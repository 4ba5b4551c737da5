"""Mixup and CutMix of pairs of pictures, from the pairs' own seeds. n pictures, H = W pixels a side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from raychain.core.json import Json

TOGETHER = 2
"""Pictures that are mixed with one another: the global batch's first and second, third and fourth, and so on. timm's
train.py mixes the first with the last, which would join what lies on different workers."""


class Mixing(NamedTuple):
    """How pairs are mixed; not at all by default."""

    mixup: float = 0.0
    """Alpha of the Beta distribution; 0: no mixup."""
    cutmix: float = 0.0
    probability: float = 1.0

    @property
    def on(self) -> bool:
        """Whether pictures are mixed."""
        return bool((self.mixup or self.cutmix) and self.probability)

    @property
    def identity(self) -> Json:
        """All of it, where pictures are mixed."""
        return {"mixing": list(self)} if self.on else {}


class Share(NamedTuple):
    """What a picture keeps of itself."""

    share: float
    box: tuple[int, int, int, int] | None
    """Top, bottom, left and right of what CutMix takes from the other; None: mixup, or nothing."""


def drawn(mixing: Mixing, seeds: tuple[int, int], size: int) -> Share:
    """How a pair whose samples have these seeds is mixed; timm's draws (`Mixup` with mode pair)."""
    draw = np.random.default_rng((*seeds, 3))
    if draw.random() >= mixing.probability:
        return Share(1.0, None)
    cuts = mixing.cutmix > 0 and (mixing.mixup == 0 or draw.random() < 0.5)
    alpha = mixing.cutmix if cuts else mixing.mixup
    share = float(draw.beta(alpha, alpha))
    if not cuts:
        return Share(share, None)
    side = int(size * math.sqrt(1 - share))
    y, x = draw.integers(0, size, 2)
    top, bottom = (int(min(max(edge, 0), size)) for edge in (y - side // 2, y + side // 2))
    left, right = (int(min(max(edge, 0), size)) for edge in (x - side // 2, x + side // 2))
    return Share(1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right))


def mix_pairs(columns: Mapping[str, np.ndarray], mixing: Mixing) -> dict[str, np.ndarray]:
    """The columns with pairs of neighbours mixed, and two more: `other`, int64 [n], the label of the picture that was
    mixed in, and `share`, float32 [n], how much of the picture is its own. A picture without a neighbour stays alone.

    Values of mixed pixels are rounded, as timm's FastCollateMixup does.
    """
    images, label, seed = columns["images"].copy(), columns["label"], columns["seed"].view(np.uint64)
    other, share = label.copy(), np.ones(len(label), np.float32)
    for first in range(0, len(label) - 1, TOGETHER):
        second = first + 1
        kept, box = drawn(mixing, (int(seed[first]), int(seed[second])), images.shape[1])
        if kept == 1:
            continue
        other[[first, second]] = label[[second, first]]
        share[[first, second]] = kept
        a, b = columns["images"][first], columns["images"][second]
        if box is None:
            x, y = a.astype(np.float32), b.astype(np.float32)
            images[first] = np.rint(kept * x + (1 - kept) * y)
            images[second] = np.rint(kept * y + (1 - kept) * x)
        else:
            top, bottom, left, right = box
            images[first, top:bottom, left:right] = b[top:bottom, left:right]
            images[second, top:bottom, left:right] = a[top:bottom, left:right]
    return {**columns, "images": images, "other": other, "share": share}
