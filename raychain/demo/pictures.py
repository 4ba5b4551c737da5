"""Draws a recipe: glyphs, tilted and scaled, on a background of a named colour and kind.

Legend: s side of the picture in pixels; positions and sizes are shares of it unless they say pixels.
"""

import colorsys
import math
from io import BytesIO
from random import Random

import numpy as np
from PIL import Image

from raychain.demo.compositions import Recipe

# Hue, saturation and value ranges in which anyone would use the word, and what its lighter or darker second shade is.
SHADES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float], float]] = {
    "white": ((0.0, 1.0), (0.0, 0.03), (0.97, 1.0), -0.14),
    "grey": ((0.0, 1.0), (0.0, 0.04), (0.45, 0.65), 0.35),
    "red": ((-0.012, 0.012), (0.75, 0.9), (0.8, 0.95), -0.3),
    "orange": ((0.068, 0.085), (0.85, 1.0), (0.95, 1.0), 0.35),
    "yellow": ((0.145, 0.165), (0.65, 0.9), (0.95, 1.0), 0.5),
    "green": ((0.28, 0.39), (0.5, 0.8), (0.55, 0.8), 0.4),
    "blue": ((0.57, 0.63), (0.6, 0.85), (0.7, 0.95), 0.4),
    "purple": ((0.75, 0.79), (0.5, 0.7), (0.55, 0.75), 0.4),
    "pink": ((0.91, 0.95), (0.3, 0.45), (0.97, 1.0), 0.5),
    "brown": ((0.06, 0.08), (0.55, 0.7), (0.4, 0.52), 0.25),
}
ALONE = (0.45, 0.95)  # side of a glyph that stands alone
PAIRED = (0.36, 0.48)  # side of each of two: the sum stays below 1, so they do not overlap
TILT_PICK, TILT_OTHER = 22.0, 8.0  # degrees either way
JPEG_QUALITY = 90


class Painter:
    """Draws pictures of `size` pixels a side from glyph masters, keeping scaled copies of the glyphs it has used.

    Args:
        size: side of the pictures in pixels.
        masters: uint8, shape (names, m, m, 4), as in `Glyphs`, with m at least `size`.
        picks: for each name whether it may be mirrored and tilted freely.
    """

    def __init__(self, size: int, masters: np.ndarray, picks: list[bool]) -> None:
        self.size = size
        self.masters = masters
        self.picks = picks
        self._scaled: dict[tuple[int, int], Image.Image] = {}
        # Sides of the copies in pixels, √2 apart: a glyph is never shrunk further than that when it is placed.
        self._sides = [math.ceil(size / 2 ** (step / 2)) for step in range(5)]
        self._y, self._x = np.mgrid[0:size, 0:size].astype(np.float32) / size

    def paint(self, recipe: Recipe, rng: Random) -> tuple[bytes, float]:
        """The picture as JPEG, and the side of its first glyph as a share of the picture's."""
        picture = self._background(recipe, rng)
        if recipe.second is None:
            scale = rng.uniform(*ALONE)
            margin = max(0.0, 1 - scale) / 2
            centre = (0.5 + rng.uniform(-margin, margin), 0.5 + rng.uniform(-margin, margin))
            self._place(picture, recipe.first, scale, centre, rng)
        else:
            scale, other = rng.uniform(*PAIRED), rng.uniform(*PAIRED)
            near, far = _along(scale, other, rng)
            side = max(scale, other) / 2
            level = rng.uniform(side, 1 - side)
            across = [min(max(level + rng.uniform(-0.07, 0.07), side), 1 - side) for _ in range(2)]
            centres = [(near, across[0]), (far, across[1])]
            if recipe.vertical:
                centres = [(x, y) for y, x in centres]
            self._place(picture, recipe.first, scale, centres[0], rng)
            self._place(picture, recipe.second, other, centres[1], rng)
        encoded = BytesIO()
        picture.save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return encoded.getvalue(), scale

    def _place(self, picture: Image.Image, name: int, scale: float, centre: tuple[float, float], rng: Random) -> None:
        """Pastes a glyph `scale` large, tilted and perhaps mirrored, around `centre` (x, y)."""
        pick = self.picks[name]
        tilt = math.radians(rng.uniform(-1, 1) * (TILT_PICK if pick else TILT_OTHER))
        mirror = -1.0 if rng.random() < 0.5 and pick else 1.0
        side = scale * self.size
        source = self._copy(name, side)
        cos, sin = math.cos(tilt), math.sin(tilt)
        extent = math.ceil(side * (abs(cos) + abs(sin)))
        left, top = (centre[axis] * self.size - extent / 2 for axis in (0, 1))
        shift_x, shift_y = left - math.floor(left), top - math.floor(top)
        # Maps a pixel of the pasted square back to the copy: shift to the centre, undo the tilt, then scale and mirror.
        zoom = source.width / side
        a, b = zoom * mirror * cos, zoom * mirror * sin
        d, e = -zoom * sin, zoom * cos
        half, middle = extent / 2, source.width / 2
        c = middle - a * (half + shift_x) - b * (half + shift_y)
        f = middle - d * (half + shift_x) - e * (half + shift_y)
        square = source.transform(
            (extent + 1, extent + 1), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC
        ).convert("RGBA")
        picture.paste(square, (math.floor(left), math.floor(top)), square)

    def _copy(self, name: int, side: float) -> Image.Image:
        """The smallest copy of a glyph with at least `side` pixels, premultiplied so that its edges stay clean."""
        chosen = min(copy for copy in self._sides if copy >= side)
        key = (name, chosen)
        if key not in self._scaled:
            master = Image.fromarray(self.masters[name]).convert("RGBa")
            self._scaled[key] = master.resize((chosen, chosen), Image.Resampling.BOX)
        return self._scaled[key]

    def _background(self, recipe: Recipe, rng: Random) -> Image.Image:
        first, second = _shades(recipe.colour, rng)
        if recipe.kind == "plain":
            return Image.new("RGB", (self.size, self.size), tuple(round(255 * part) for part in first))
        amount = self._pattern(recipe.kind, rng)[..., None]
        if rng.random() < 0.5:
            amount = 1 - amount
        pixels = np.asarray(first, np.float32) * (1 - amount) + np.asarray(second, np.float32) * amount
        return Image.fromarray((255 * pixels).astype(np.uint8))

    def _pattern(self, kind: str, rng: Random) -> np.ndarray:
        """How much of the second shade each pixel has: float32 in [0, 1], shape (s, s)."""
        if kind == "noisy":
            noise = np.frombuffer(rng.randbytes(self.size * self.size), np.uint8)
            return noise.reshape(self.size, self.size).astype(np.float32) / 255
        turn = rng.uniform(0, 2 * math.pi)
        cos, sin = math.cos(turn), math.sin(turn)
        u, v = self._x * cos + self._y * sin, self._y * cos - self._x * sin
        if kind == "gradient":
            low, high = float(u.min()), float(u.max())
            return (u - low) / (high - low)
        period = rng.uniform(0.14, 0.26)
        u, v = (u + rng.random()) / period % 1, (v + rng.random()) / period % 1
        if kind == "striped":
            return (u < 0.5).astype(np.float32)
        if kind == "checkered":
            return ((u < 0.5) ^ (v < 0.5)).astype(np.float32)
        return ((u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.08).astype(np.float32)


def _along(scale: float, other: float, rng: Random) -> tuple[float, float]:
    """Centres of two glyphs on a line of length 1, the first before the second, without overlap."""
    slack = 1 - scale - other
    start, end = sorted((rng.uniform(0, slack), rng.uniform(0, slack)))
    return start + scale / 2, end + scale + other / 2


def _shades(colour: str, rng: Random) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Two shades of a colour, red, green and blue in [0, 1]."""
    hue, saturation, value, change = SHADES[colour]
    first = colorsys.hsv_to_rgb(rng.uniform(*hue) % 1, rng.uniform(*saturation), rng.uniform(*value))
    target = 1.0 if change > 0 else 0.0
    return first, tuple(part + abs(change) * (target - part) for part in first)
