"""What is done to a picture between its crop and the batch: RandAugment, 3-Augment, colour jitter, flips, erasing.

Every number is drawn from a generator of the sample's own, so a picture looks the same whoever reads it. Operations and
their strengths are timm's (`timm.data.auto_augment`, the `inc` set) and DeiT III's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from timm.data.auto_augment import NAME_TO_OP

from raychain.core.json import Json

MOST = 10.0
"""The strongest magnitude."""
MEAN = (124, 116, 104)
"""Colour of what moves into a picture: the mean of ImageNet."""
APPLIED = 0.5
"""Probability with which RandAugment applies an operation that it has drawn."""
ERASED, ERASED_RATIO = (0.02, 1 / 3), 0.3
"""Share of a picture that is erased, and the narrowest rectangle's ratio of sides."""
NOISE = 58
"""Standard deviation of the noise in erased rectangles, in levels: about ImageNet's."""
TRIES = 10
Draw = np.random.Generator


class RandAugment(NamedTuple):
    """timm's `rand-…`: operations in a row, and how strong they are."""

    magnitude: float
    spread: float
    """Standard deviation of the magnitude."""
    layers: int


ALLOWED = "3a, or timm's rand-mM-nN-mstdS-inc1: magnitude 0 … 10, operations in a row, spread of the magnitude"


def parse_augment(text: str) -> RandAugment | None:
    """RandAugment's numbers; None for 3-Augment. Raises ValueError for what is neither."""
    if text == "3a":
        return None
    kind, *parts = text.split("-")
    values = {"m": 9.0, "n": 2.0, "mstd": 0.5, "inc": 0.0}
    for part in parts:
        name = part.rstrip("0123456789.")
        try:
            if name not in values:
                raise ValueError
            values[name] = float(part[len(name) :])
        except ValueError:
            raise ValueError(f"allowed is {ALLOWED}") from None
    layers = int(values["n"])
    if kind != "rand" or not 0 <= values["m"] <= MOST or layers != values["n"] or not 1 <= layers <= 16:
        raise ValueError(f"allowed is {ALLOWED}")
    if values["inc"] != 1:
        raise ValueError(f"allowed is {ALLOWED}; only the set of operations that get stronger with the magnitude, inc1")
    return RandAugment(values["m"], values["mstd"], layers)


@dataclass(frozen=True)
class Changes:
    """How pictures are changed; nothing by default."""

    flip: float = 0.0
    augment: str | None = None
    color_jitter: float = 0.0
    erase: float = 0.0

    @property
    def identity(self) -> Json:
        """Those that are made."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}

    def mirrored(self, seed: int) -> bool:
        """Whether `apply` mirrors the sample's picture."""
        return bool(self.flip) and np.random.default_rng((seed, 1)).random() < self.flip

    def apply(self, pixels: np.ndarray, seed: int) -> np.ndarray:
        """A picture, uint8 [H, W, 3] that is not written to, changed as the sample's seed says; not yet erased."""
        if not self.flip and self.augment is None and not self.color_jitter:
            return pixels
        draw = np.random.default_rng((seed, 1))
        if draw.random() < self.flip:
            pixels = pixels[:, ::-1]
        if self.augment is None and not self.color_jitter:
            return pixels
        image = Image.fromarray(np.ascontiguousarray(pixels))
        if self.augment is not None:
            chosen = parse_augment(self.augment)
            image = three_augment(image, draw) if chosen is None else rand_augment(image, chosen, draw)
        if self.color_jitter:
            image = jittered(image, self.color_jitter, draw)
        return np.asarray(image)

    def erased(self, pixels: np.ndarray, seed: int) -> None:
        """Erases a rectangle of a picture, uint8 [H, W, 3], in place, if the sample's seed says so."""
        if not self.erase:
            return
        draw = np.random.default_rng((seed, 2))
        if draw.random() >= self.erase:
            return
        height, width = pixels.shape[:2]
        for _ in range(TRIES):
            area = draw.uniform(*ERASED) * height * width
            ratio = math.exp(draw.uniform(math.log(ERASED_RATIO), -math.log(ERASED_RATIO)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < h < height and 0 < w < width:
                top, left = draw.integers(height - h + 1), draw.integers(width - w + 1)
                noise = draw.normal(MEAN, NOISE, (h, w, 3))
                pixels[top : top + h, left : left + w] = np.rint(noise).clip(0, 255)
                return


def _signed(value: float, draw: Draw) -> float:
    return value if draw.random() < 0.5 else -value


def _enhanced(level: float, draw: Draw) -> float:
    return max(0.1, 1.0 + _signed(level * 0.9, draw))


OPERATIONS: dict[str, Callable[[float, Draw], tuple[float, ...]]] = {
    "AutoContrast": lambda *_: (),
    "Equalize": lambda *_: (),
    "Invert": lambda *_: (),
    "Rotate": lambda level, draw: (_signed(level * 30, draw),),
    "PosterizeIncreasing": lambda level, _: (max(4 - int(level * 4), 1),),
    "SolarizeIncreasing": lambda level, _: (256 - min(256, int(level * 256)),),
    "SolarizeAdd": lambda level, _: (min(128, int(level * 110)),),
    "ColorIncreasing": lambda level, draw: (_enhanced(level, draw),),
    "ContrastIncreasing": lambda level, draw: (_enhanced(level, draw),),
    "BrightnessIncreasing": lambda level, draw: (_enhanced(level, draw),),
    "SharpnessIncreasing": lambda level, draw: (_enhanced(level, draw),),
    "ShearX": lambda level, draw: (_signed(level * 0.3, draw),),
    "ShearY": lambda level, draw: (_signed(level * 0.3, draw),),
    "TranslateXRel": lambda level, draw: (_signed(level * 0.45, draw),),
    "TranslateYRel": lambda level, draw: (_signed(level * 0.45, draw),),
}
"""timm's operations with what they take at a level from 0 to 1."""
NAMES = tuple(OPERATIONS)


def rand_augment(image: Image.Image, how: RandAugment, draw: Draw) -> Image.Image:
    """RandAugment (Cubuk et al. 2020) as timm has it."""
    options: dict[str, Any] = {"fillcolor": MEAN, "resample": Image.Resampling.BICUBIC}
    for place in draw.integers(len(NAMES), size=how.layers):
        applied = draw.random() < APPLIED
        level = min(max(draw.normal(how.magnitude, how.spread), 0.0), MOST) / MOST
        values = OPERATIONS[NAMES[place]](level, draw)
        if applied:
            operation: Any = NAME_TO_OP[NAMES[place]]
            image = operation(image, *values, **options)
    return image


def three_augment(image: Image.Image, draw: Draw) -> Image.Image:
    """3-Augment (Touvron et al. 2022): one of grey, solarised and blurred."""
    choice, radius = draw.integers(3), draw.uniform(0.1, 2.0)
    if choice == 0:
        return ImageOps.grayscale(image).convert("RGB")
    return ImageOps.solarize(image) if choice == 1 else image.filter(ImageFilter.GaussianBlur(radius))


JITTERS: tuple[Any, ...] = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def jittered(image: Image.Image, by: float, draw: Draw) -> Image.Image:
    """Brightness, contrast and saturation times numbers in 1 ± `by`, in an order that is drawn too."""
    factors = draw.uniform(1 - by, 1 + by, len(JITTERS))
    for place in draw.permutation(len(JITTERS)):
        image = JITTERS[place](image).enhance(factors[place])
    return image
