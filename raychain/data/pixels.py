"""Encoded pictures to RGB pixels in bounded memory, whatever their format, size and depth.

Decoding takes MEMORY bytes at most: what would take more is refused, as PostScript is, which is a program. A picture of
more than LARGE pixels, or one whose resized whole would have more (20,000 × 1), is resized in pieces, of which only
those are worked on that the crop shows; the result is Pillow's to the bit.

Grey of more than 8 bits (16-bit PNG, TIFF, PGM) is scaled: 16 bits to their upper 8, as Pillow itself reads 16-bit
colour. Numbers whose range no file tells (32-bit and floating-point TIFF) are refused. Pillow's conversion, and so
open_clip and clip_benchmark, clips both to 255 instead, which is white for nearly all of them; pictures that must be
open_clip's to the bit (`exactly`) are clipped too, and whoever reads them says so. Every other mode (palettes, alpha,
CMYK, bilevel) is converted as open_clip does: colours as they are stored, alpha dropped.
"""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from raychain.data.health import BOMB, UNREADABLE, Unusable

MEMORY = 2**29
"""Bytes that decoding a picture may take."""
LARGE = 2**25
"""Pixels above which a picture is not converted and resized as a whole."""
PIECE = 2**20
"""Pixels of a piece."""
MARGIN = {"PNG": 0, "BMP": 0, "GIF": 0, "PPM": 0, "WEBP": 12}
"""Format → bytes a pixel that its decoder takes besides the picture."""
OTHERS = 16
_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2, "LA": 4, "PA": 4}
_BITS_16 = ("PNG", "PPM")
"""Formats whose numbers of more than 8 bits Pillow reads as 0 … 65,535."""
_PRECISION = 22
"""Bits of Pillow's weights behind the point."""
_turn = threading.Lock()


def opened(encoded: bytes) -> Image.Image:
    """The picture, its header read. Raises Unusable for one that takes too much to decode, and what Pillow raises."""
    image = Image.open(io.BytesIO(encoded))
    if image.format == "EPS":
        raise Unusable(UNREADABLE, "PostScript is no picture")
    needed = _needed(image)
    if needed > MEMORY:
        detail = f"{image.width:,} × {image.height:,} pixels would take {needed / 2**20:,.0f} MiB"
        raise Unusable(BOMB, detail)
    return image


def is_deep(picture: Image.Image | bytes) -> bool:
    """Whether a picture, or an encoded one that can be read, has one channel of more than 8 bits."""
    if isinstance(picture, bytes):
        return not picture.startswith(b"\xff\xd8") and is_deep(Image.open(io.BytesIO(picture)))
    return picture.mode.startswith(("I", "F"))


def check_range(image: Image.Image) -> None:
    """Raises Unusable for a picture of numbers whose range is not known."""
    if image.mode == "F" or (image.mode == "I" and image.format not in _BITS_16):
        raise Unusable(UNREADABLE, f"{'floating-point' if image.mode == 'F' else '32-bit'} numbers of unknown range")


def in_turn(pixels: int) -> contextlib.AbstractContextManager[Any]:
    """Only one thread decodes a picture of more than LARGE pixels at a time."""
    return _turn if pixels > LARGE else contextlib.nullcontext()


def rgb(image: Image.Image, exactly: bool = False) -> Image.Image:
    """The picture, or a piece of it, in RGB: clipped as open_clip does with `exactly`, else as the module says."""
    if image.mode == "RGB":
        image.load()
        return image
    if is_deep(image) and not exactly:
        grey = np.asarray(image)
        return Image.fromarray((grey.astype(np.uint16, copy=False) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info and not is_deep(image):
        image = image.convert("RGBA")  # the same colours as below, without Pillow's warning
    return image.convert("RGB")


class Frame(NamedTuple):
    """A picture resized to `width` × `height`, and what is kept of that."""

    width: int
    height: int
    left: int
    top: int
    columns: int
    rows: int


def framed(image: Image.Image, frame: Frame, kernel: str = "bicubic", *, exactly: bool = False) -> np.ndarray:
    """uint8 [rows, columns, 3]: the picture converted and resized, and the frame's part of it, as Pillow does it."""
    if image.width * image.height > LARGE or frame.width * frame.height > LARGE:
        return _in_pieces(image, frame, kernel, exactly)
    resized = np.array(rgb(image, exactly).resize((frame.width, frame.height), Image.Resampling[kernel.upper()]))
    return resized[frame.top : frame.top + frame.rows, frame.left : frame.left + frame.columns]


def _needed(image: Image.Image) -> int:
    """Bytes that decoding takes: the picture, and what its decoder holds besides, such as coefficients or canvases."""
    margin: float = MARGIN.get(image.format or "", OTHERS)
    if image.format in ("JPEG", "MPO"):
        layers = getattr(image, "layer", [])  # of each colour: name, horizontal and vertical sampling, …
        full = max((h * v for _, h, v, *_ in layers), default=1)
        margin = 2 * sum(h * v for _, h, v, *_ in layers) / full if "progressive" in image.info else 0
    return int(image.width * image.height * (_PIXEL.get(image.mode, 4) + margin))


def _in_pieces(image: Image.Image, frame: Frame, kernel: str, exactly: bool) -> np.ndarray:
    """The result of `framed`, from the rows and columns that are needed alone: first along one side, piece by piece,
    then along the other, in the order that Pillow takes."""
    across = _Weights(image.width, frame.width, frame.left, frame.columns, kernel)
    down = _Weights(image.height, frame.height, frame.top, frame.rows, kernel)
    lost = image.width - frame.width, image.height - frame.height
    if _down_first() and lost[1] > 0 and lost[1] > 2 * lost[0]:
        found = np.empty((frame.rows, across.stop - across.start, 3), np.uint8)
        for left, right in across.pieces(down.stop - down.start):
            piece = rgb(image.crop((left, down.start, right, down.stop)), exactly)
            found[:, left - across.start : right - across.start] = down.apply(np.asarray(piece))
        return _turned(across.apply(_turned(found)))
    found = np.empty((down.stop - down.start, frame.columns, 3), np.uint8)
    for top, bottom in down.pieces(across.stop - across.start):
        piece = rgb(image.crop((across.start, top, across.stop, bottom)), exactly)
        found[top - down.start : bottom - down.start] = _turned(across.apply(_turned(np.asarray(piece))))
    return down.apply(found)


def _turned(pixels: np.ndarray) -> np.ndarray:
    """Rows as columns."""
    return pixels.transpose(1, 0, 2)


@functools.cache
def _down_first() -> bool:
    """Whether Pillow resizes columns before rows where they lose more than twice as many pixels, as 13 does; else
    rows always come first."""
    noise = Image.fromarray((np.arange(40 * 4 * 3) * 2_654_435_761 >> 7).astype(np.uint8).reshape(40, 4, 3))
    in_turn = noise.resize((4, 9), Image.Resampling.BICUBIC).resize((16, 9), Image.Resampling.BICUBIC)
    return in_turn.tobytes() == noise.resize((16, 9), Image.Resampling.BICUBIC).tobytes()


class _Weights:
    """Pillow's resampling of `length` pixels to `resized`, of which `count` from `first` on are wanted.

    It takes the pixels from `start` to `stop`. What shrinks is left to Pillow; what grows, and may grow to gigabytes,
    has weights that are computed as Pillow's C code computes them, for the pixels that are wanted alone.
    """

    def __init__(self, length: int, resized: int, first: int, count: int, kernel: str) -> None:
        self._resized, self._kernel, self._kept = resized, kernel, slice(first, first + count)
        self._shrinks, self._same = resized < length, resized == length
        self.start, self.stop = 0, length
        if self._same:
            self.start, self.stop = first, first + count
        elif not self._shrinks:
            scale, support = float(np.float32(length)) / resized, 2.0 if kernel == "bicubic" else 1.0
            centre_n = (np.arange(first, first + count) + 0.5) * scale
            self._begin_n = np.maximum((centre_n - support + 0.5).astype(np.int64), 0)
            end_n = np.minimum((centre_n + support + 0.5).astype(np.int64), length)
            place_nk = self._begin_n[:, None] + np.arange((end_n - self._begin_n).max())
            weight_nk = _KERNELS[kernel](np.abs(place_nk - centre_n[:, None] + 0.5))
            weight_nk[place_nk >= end_n[:, None]] = 0
            weight_nk /= weight_nk.cumsum(1)[:, -1:]
            self._weight_nk = np.trunc(np.copysign(0.5, weight_nk) + weight_nk * (1 << _PRECISION))
            self.start, self.stop = int(self._begin_n.min()), int(end_n.max())

    def pieces(self, other: int) -> Iterator[tuple[int, int]]:
        """From where to where the pieces are that have PIECE pixels, `other` on the other side."""
        step = max(1, PIECE // other)
        for start in range(self.start, self.stop, step):
            yield start, min(start + step, self.stop)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [count, m, 3] of pixels [stop - start, m, 3]."""
        if self._same:
            return pixels
        if self._shrinks:
            image = Image.fromarray(np.ascontiguousarray(pixels))
            size = pixels.shape[1], self._resized
            return np.asarray(image.resize(size, Image.Resampling[self._kernel.upper()]))[self._kept]
        found = np.empty((len(self._begin_n), *pixels.shape[1:]), np.uint8)
        for i, begin in enumerate(self._begin_n - self.start):
            taken = pixels[begin : begin + self._weight_nk.shape[1]]
            total = self._weight_nk[i, : len(taken)] @ taken.reshape(len(taken), -1).astype(np.float64)  # exact
            found[i] = np.clip(np.floor(total * 2.0**-_PRECISION + 0.5), 0, 255).reshape(pixels.shape[1:])
        return found


def _bicubic(x: np.ndarray) -> np.ndarray:
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.where(x < 1, 1 - x, 0.0)


_KERNELS = {"bicubic": _bicubic, "bilinear": _bilinear}
