"""What a cached shard holds, and whether its pictures are kept as pixels or as JPEG."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from raychain.data.members import Wanted

Tokenize = Callable[[Sequence[str]], np.ndarray]
"""Captions → token ids, integer [captions, context length], padded."""


class Tokenizer(Protocol):
    """A `Tokenize` that caches can tell from others."""

    @property
    def identity(self) -> str:
        """Its name and settings."""

    def __call__(self, captions: Sequence[str], /) -> np.ndarray:
        """Token ids, integer [captions, context length], padded."""


Representation = Literal["raw", "jpeg"]

FORMAT = 3
STORED_BEYOND_CROP = 1.15
"""With random crops the whole picture is kept, its shorter side this much larger than the crop's output."""
ASPECT = 4 / 3
"""Longer by shorter side of a usual photograph: how large whole pictures are is guessed from it."""
RAW_BYTES = 64 * 2**30
"""Pixels of a data set up to which they are kept as they are."""
QUALITY = 95
"""JPEG quality of pictures that are kept so, colour at half resolution: off by about a level."""


@dataclass(frozen=True)
class Resizing:
    """How evaluation makes pictures square: the shorter side resized and the centre cropped, or both sides resized."""

    squash: bool = False
    """Both sides, which changes the picture's proportions."""
    kernel: Literal["bicubic", "bilinear"] = "bicubic"
    crop: float = field(default=1.0, repr=False)  # `digest` has it where it is another
    """Side of what is cropped out of the centre, as a share of the side that was resized (timm's `crop_pct`)."""

    @property
    def digest(self) -> str:
        """All of it in words."""
        return str(self) if self.crop == 1 else f"{self}, crop={self.crop}"


def squared(preprocessing: Mapping[str, Any]) -> tuple[int, Resizing]:
    """Pixels a side, and how pictures get there, of an open_clip `preprocess_cfg`, or of one with a `crop_pct` beside.

    Raises ValueError, which tells what it asks for, where that is something else.
    """
    size = preprocessing["size"]
    height, width = (size, size) if isinstance(size, int) else size
    mode: str = preprocessing.get("resize_mode") or "shortest"
    kernel: Any = preprocessing.get("interpolation") or "bicubic"
    crop = preprocessing.get("crop_pct", 1.0)
    known = mode in ("shortest", "squash") and kernel in ("bicubic", "bilinear") and 0 < crop <= 1
    if height != width or not known:
        cropped = f", crop_pct {crop}" if crop != 1 else ""
        raise ValueError(f"{height} × {width} pixels, resize_mode {mode}, {kernel}{cropped}")
    return height, Resizing(mode == "squash", kernel, crop)


SQUARED = "square pictures, resize_mode shortest or squash, bicubic or bilinear"
"""What `squared` takes."""


@dataclass(frozen=True)
class Spec:
    """What a cached shard holds; shards of different specs are different files."""

    wanted: Wanted
    image_size: int
    tokenizer: str
    """Identity of the tokeniser: name, vocabulary, context length."""
    cropped: bool = False
    """Keep the whole picture for random crops instead of the resized centre."""
    pixels: Representation = "raw"
    beyond: float = STORED_BEYOND_CROP
    """Shorter side of whole pictures that are kept for random crops, as a multiple of `image_size`."""
    exactly: Resizing | None = None
    """To the bit what open_clip's evaluation sees; else bicubic, quicker, and off by a level here and there."""

    @property
    def digest(self) -> str:
        """Content address of the spec."""
        kept = self.pixels if self.pixels == "raw" else f"{self.pixels}{QUALITY}"
        text = f"{FORMAT}|{self.wanted.digest}|{self.image_size}|{self.tokenizer}|{self.cropped}|{kept}"
        text += f"|{self.exactly.digest}" if self.exactly else ""
        text += f"|{self.beyond:g}" if self.cropped and self.beyond != STORED_BEYOND_CROP else ""
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a sample's pixels; a guess for whole pictures."""
        if not self.cropped:
            return 3 * self.image_size**2
        return round(3 * (self.beyond * self.image_size) ** 2 * ASPECT)


def representation(samples: int, bytes_per_sample: int, budget: int) -> Representation:
    """`raw` where the pixels of all samples fit into `budget` bytes, else `jpeg`."""
    return "raw" if samples * bytes_per_sample <= budget else "jpeg"


def fitting(spec: Spec, samples: int, store: Representation | None) -> Spec:
    """The spec with the representation `store`; where that is None, raw if the pixels of all samples are RAW_BYTES at
    most, whatever the cache of a machine can hold: pictures, and so results, are the same on all of them."""
    return replace(spec, pixels=store or representation(samples, spec.pixel_bytes, RAW_BYTES))
