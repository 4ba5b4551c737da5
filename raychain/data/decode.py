"""A shard's samples decoded, resized and tokenised into Arrow record batches; pictures between JPEG and pixels."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

from raychain.data import members, shards
from raychain.data.health import DEEP, Bad, Unusable, picture, tally
from raychain.data.pixels import LARGE, Frame, check_range, framed, in_turn, is_deep, opened, rgb
from raychain.data.shards import Shard
from raychain.data.spec import QUALITY, STORED_BEYOND_CROP, Resizing, Spec, Tokenize

log = logging.getLogger("raychain.data")

BATCH_BYTES = 2**23
"""Bytes of pictures in a record batch; that many are in memory at once, or one picture if it has more."""
VECTORISED = torch.backends.cpu.get_cpu_capability().startswith("AVX")
"""Whether torch resizes bytes with vector instructions, five times faster than Pillow; elsewhere it is slower."""


class Row(NamedTuple):
    """A sample's row, but for its picture and its captions."""

    key: str
    end: int
    """Where its picture ends among those of the batch."""
    height: int
    width: int
    label: int
    classes: bytes


def decode(shard: Shard, spec: Spec, tokenize: Tokenize, bad: list[Bad]) -> Iterator[pa.RecordBatch]:
    """The decoded shard in batches of BATCH_BYTES; a batch's pictures are overwritten by those of the next one.

    Samples that turn out unusable have no row and are added to `bad`, and so is what is used and worth a word (kinds of
    USED), such as pictures that are clipped as open_clip clips them. Raises OSError for a shard that cannot be read,
    has changed since it was surveyed, or has no usable sample at all.
    """
    pictures = np.empty(BATCH_BYTES, np.uint8)
    rows: list[Row] = []
    texts: list[list[str]] = []
    found = lost = end = 0
    # where nobody has counted, what counting finds is found here
    for sample in shards.read(shard, spec.wanted, *((bad.append,) if shard.declared else ())):
        try:
            told = members.annotation(sample, spec.wanted)
            image = (
                picture(resize_exactly, members.picture(sample), spec.image_size, spec.exactly)
                if spec.exactly
                else picture(resize, members.picture(sample), spec.image_size, spec.cropped, spec.beyond)
            )
        except Unusable as error:
            bad.append(Bad(error.kind, sample["key"], error.detail))
            lost += 1
            continue
        if spec.exactly and is_deep(members.picture(sample)):
            bad.append(Bad(DEEP, sample["key"]))
        content = image if spec.pixels == "raw" else np.frombuffer(to_jpeg(image), np.uint8)
        if end + content.size > len(pictures):
            if rows:
                yield _record_batch(rows, pictures, texts, tokenize)
            rows, texts, end = [], [], 0
            if content.size > len(pictures):
                pictures = np.empty(content.size, np.uint8)
        start, end = end, end + content.size
        pictures[start:end].reshape(content.shape)[:] = content
        height, width = image.shape[:2]
        rows.append(Row(sample["key"], end, height, width, told.label, told.classes))
        texts.append(told.captions)
        found += 1
    if found + lost != shard.samples and shard.declared:
        _say_miscounted(shard, found + lost)
    elif found + lost != shard.samples:
        raise OSError(f"{shard.address} has changed: {shard.samples} samples were counted, {found + lost} read")
    if not found:
        raise OSError(f"{shard.address}: none of its {shard.samples} samples can be used: {tally(bad)}")
    yield _record_batch(rows, pictures, texts, tokenize)


def _say_miscounted(shard: Shard, there: int) -> None:
    """Says what a wrong count does: the order of samples is made of counts."""
    less = there < shard.samples
    log.warning(
        "%s: %s samples are there and %s were expected (%s), so %s. raychain data index counts them",
        shard.address, f"{there:,}", f"{shard.samples:,}", shard.source,
        "some are used more often than others" if less else f"{there - shard.samples:,} are never used",
    )  # fmt: skip


def _record_batch(rows: list[Row], pictures: np.ndarray, texts: list[list[str]], tokenize: Tokenize) -> pa.RecordBatch:
    ends = np.array([0, *(row.end for row in rows)], dtype=np.int64)
    images = [None, pa.py_buffer(ends), pa.py_buffer(pictures[: ends[-1]])]
    kinds = {"key": pa.string(), "height": pa.int32(), "width": pa.int32(), "label": pa.int32()}
    kinds |= {"classes": pa.binary()} if rows[0].classes else {}
    columns = {name: pa.array([getattr(row, name) for row in rows], kind) for name, kind in kinds.items()}
    columns["image"] = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(rows), images)
    tokens = _tokens([text for pool in texts for text in pool], tokenize)
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    return pa.RecordBatch.from_pydict({**columns, "captions": pa.ListArray.from_arrays(offsets, tokens)})


def _tokens(texts: list[str], tokenize: Tokenize) -> pa.Array:
    distinct = list(dict.fromkeys(texts))
    ids = tokenize(distinct).astype(np.int32) if distinct else np.zeros((0, 1), np.int32)
    place = {text: i for i, text in enumerate(distinct)}
    rows = ids[[place[text] for text in texts]] if texts else ids
    width = rows.shape[1] * 4
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))]
    )


def resize(encoded: bytes, size: int, whole: bool = False, beyond: float = STORED_BEYOND_CROP) -> np.ndarray:
    """A picture as uint8 [H, W, 3]: shorter side resized to `size` (bicubic, as open_clip's evaluation does), centre
    cropped to a square; with `whole` the full picture, its shorter side `beyond` × `size` at most.

    Raises Unusable for a picture that takes too much memory or whose numbers have no known range, and what Pillow
    raises.
    """
    short = round(size * beyond) if whole else size
    area = _jpeg_area(encoded)
    image = None if 0 < area <= LARGE else opened(encoded)
    with in_turn(image.width * image.height if image else area):
        pixels = _jpeg(encoded, 2 * short) if 0 < area <= (Image.MAX_IMAGE_PIXELS or area) else None
        if pixels is None:
            image = image or opened(encoded)
            check_range(image)
            if image.width * image.height > LARGE:
                return _resized(image, size, short, whole)
            pixels = np.array(rgb(image))
        return _resized(pixels, size, short, whole)


def _resized(source: np.ndarray | Image.Image, size: int, short: int, whole: bool) -> np.ndarray:
    """`resize` of pixels, or of a picture that is too large to be worked on as a whole."""
    width, height = source.size if isinstance(source, Image.Image) else (source.shape[1], source.shape[0])
    if not whole or min(width, height) > short:
        width, height = shorter_to(width, height, short)
    elif isinstance(source, np.ndarray):
        return source
    columns, rows = (_at_most(width, height), _at_most(height, width)) if whole else (size, size)
    frame = Frame(width, height, round((width - columns) / 2), round((height - rows) / 2), columns, rows)
    if isinstance(source, Image.Image):
        return framed(source, frame)
    if width * height > LARGE:
        return framed(Image.fromarray(source), frame)
    pixels = scale(source, height, width)
    return pixels[frame.top : frame.top + rows, frame.left : frame.left + columns]


def _at_most(side: int, other: int) -> int:
    """The part of a side that is kept of a whole picture with LARGE pixels or more."""
    return min(side, max(LARGE // other, other))


def resize_exactly(encoded: bytes, size: int, how: Resizing) -> np.ndarray:
    """A picture as uint8 [size, size, 3], to the bit what open_clip's evaluation, or timm's, sees: Pillow decodes and
    resizes.

    Raises Unusable for a picture that takes too much memory, and what Pillow raises.
    """
    image = opened(encoded)
    with in_turn(image.width * image.height):
        short = math.floor(size / how.crop)
        width, height = (short, short) if how.squash else shorter_to(*image.size, short)
        frame = Frame(width, height, round((width - size) / 2), round((height - size) / 2), size, size)
        return framed(image, frame, how.kernel, exactly=True)


def shorter_to(width: int, height: int, short: int) -> tuple[int, int]:
    """Width and height of a picture whose shorter side becomes `short`, rounded as torchvision does."""
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)


def _jpeg_area(encoded: bytes) -> int:
    """Pixels of a JPEG; 0 for what is none, or has a header that cannot be read."""
    if not encoded.startswith(b"\xff\xd8"):
        return 0
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return 0
    return int(height * width)


def _jpeg(encoded: bytes, least: int) -> np.ndarray | None:
    """uint8 [H, W, 3], at 1/2 or less of its size where that leaves `least` pixels a side; None for what only Pillow
    can convert, or say what is wrong with."""
    with contextlib.suppress(ValueError):
        return simplejpeg.decode_jpeg(encoded, "RGB", min_height=least, min_width=least, min_factor=2)
    return None


def scale(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] (contiguous, writable) resized: bicubic with antialiasing, within a level of Pillow's."""
    if pixels.shape[:2] == (height, width):
        return pixels
    if not VECTORISED:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    x_13HW = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # in this order torch sees that channels come last
    scaled = F.interpolate(x_13HW, (height, width), mode="bicubic", antialias=True)
    return scaled.permute(0, 2, 3, 1)[0].numpy()


def scale_into(target: torch.Tensor, window: torch.Tensor) -> None:
    """Writes what `scale` makes of a window, uint8 [1, 3, h, w], into uint8 [1, 3, H, W], channels last both."""
    if target.shape == window.shape:
        target.copy_(window)
    elif VECTORISED:
        torch.ops.aten._upsample_bicubic2d_aa.out(window, target.shape[2:], False, None, None, out=target)
    else:
        pixels = np.ascontiguousarray(window[0].permute(1, 2, 0).numpy())
        target.copy_(torch.from_numpy(scale(pixels, *target.shape[2:]).copy()).permute(2, 0, 1)[None])


def to_jpeg(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as JPEG of quality QUALITY, colour at half resolution."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), QUALITY, "RGB", "420", fastdct=False)


def from_jpeg(content: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of what `to_jpeg` gave."""
    return simplejpeg.decode_jpeg(content, "RGB")
