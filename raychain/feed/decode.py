"""A shard's samples decoded, resized and tokenised into Arrow record batches; pictures between JPEG and pixels."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

from raychain.feed import members, shards
from raychain.feed.health import Bad, Unusable, picture, tally
from raychain.feed.shards import Shard
from raychain.feed.spec import QUALITY, STORED_BEYOND_CROP, Resizing, Spec, Tokenize

BATCH_BYTES = 2**23
"""Of pictures in a record batch; that many are in memory at once, or one picture if it has more."""
VECTORISED = torch.backends.cpu.get_cpu_capability().startswith("AVX")
"""Whether torch resizes bytes with vector instructions, five times faster than Pillow; elsewhere it is slower."""


def decode(shard: Shard, spec: Spec, tokenize: Tokenize, bad: list[Bad]) -> Iterator[pa.RecordBatch]:
    """The decoded shard in batches of BATCH_BYTES; a batch's pictures are overwritten by those of the next one.

    Samples that turn out unusable have no row and are added to `bad`. Raises OSError for a shard that cannot be read,
    has changed since it was surveyed, or has no usable sample at all.
    """
    pictures = np.empty(BATCH_BYTES, np.uint8)
    rows: list[dict[str, Any]] = []
    texts: list[list[str]] = []
    found = end = 0
    for sample in shards.read(shard, spec.wanted):
        try:
            captions, label = members.annotation(sample, spec.wanted)
            image = (
                picture(resize_exactly, members.picture(sample), spec.image_size, spec.exactly)
                if spec.exactly
                else picture(resize, members.picture(sample), spec.image_size, spec.cropped)
            )
        except Unusable as error:
            bad.append(Bad(error.kind, sample["key"], error.detail))
            continue
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
        rows.append({"key": sample["key"], "end": end, "height": height, "width": width, "label": label})
        texts.append(captions)
        found += 1
    if found + len(bad) != shard.samples:
        raise OSError(f"{shard.address} has changed: {shard.samples} samples were counted, {found + len(bad)} read")
    if not found:
        raise OSError(f"{shard.address}: none of its {shard.samples} samples can be used: {tally(bad)}")
    yield _record_batch(rows, pictures, texts, tokenize)


def _record_batch(
    rows: list[dict[str, Any]], pictures: np.ndarray, texts: list[list[str]], tokenize: Tokenize
) -> pa.RecordBatch:
    ends = np.array([0, *(row["end"] for row in rows)], dtype=np.int64)
    images = [None, pa.py_buffer(ends), pa.py_buffer(pictures[: ends[-1]])]
    kinds = {"key": pa.string(), "height": pa.int32(), "width": pa.int32(), "label": pa.int32()}
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()}
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


def resize(encoded: bytes, size: int, whole: bool = False) -> np.ndarray:
    """A picture as uint8 [H, W, 3]: shorter side resized to `size` (bicubic, as open_clip's evaluation does), centre
    cropped to a square; with `whole` the full picture, its shorter side STORED_BEYOND_CROP × `size` at most."""
    short = round(size * STORED_BEYOND_CROP) if whole else size
    pixels = _pixels(encoded, 2 * short)
    height, width = pixels.shape[:2]
    if whole and min(width, height) <= short:
        return pixels
    width, height = shorter_to(width, height, short)
    pixels = scale(pixels, height, width)
    if whole:
        return pixels
    left, top = round((width - size) / 2), round((height - size) / 2)
    return pixels[top : top + size, left : left + size]


def resize_exactly(encoded: bytes, size: int, how: Resizing) -> np.ndarray:
    """A picture as uint8 [size, size, 3], to the bit what open_clip's evaluation sees: Pillow decodes and resizes."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    width, height = (size, size) if how.squash else shorter_to(*image.size, size)
    resized = np.array(image.resize((width, height), Image.Resampling[how.kernel.upper()]))
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resized[top : top + size, left : left + size]


def shorter_to(width: int, height: int, short: int) -> tuple[int, int]:
    """Width and height of a picture whose shorter side becomes `short`, rounded as torchvision does."""
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)


def _pixels(encoded: bytes, least: int) -> np.ndarray:
    """uint8 [H, W, 3]. JPEG is decoded at 1/2 or less of its size where that leaves `least` pixels a side."""
    if encoded.startswith(b"\xff\xd8") and _is_small(encoded):
        with contextlib.suppress(ValueError):  # four colours, or damaged: Pillow converts it, or says what is wrong
            return simplejpeg.decode_jpeg(encoded, "RGB", min_height=least, min_width=least, min_factor=2)
    image: Image.Image = Image.open(io.BytesIO(encoded))
    if "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as below, without Pillow's warning
    return np.array(image.convert("RGB"))


def _is_small(jpeg: bytes) -> bool:
    """Whether Pillow would not call it a decompression bomb; False too where the header cannot be read."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
    except ValueError:
        return False
    return Image.MAX_IMAGE_PIXELS is None or height * width <= Image.MAX_IMAGE_PIXELS


def scale(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] (contiguous, writable) resized: bicubic with antialiasing, within a level of Pillow's."""
    if pixels.shape[:2] == (height, width):
        return pixels
    if not VECTORISED:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    x_13HW = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # in this order torch sees that channels come last
    scaled = F.interpolate(x_13HW, (height, width), mode="bicubic", antialias=True)
    return scaled.permute(0, 2, 3, 1)[0].numpy()


def to_jpeg(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as JPEG of quality QUALITY, colour at half resolution."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), QUALITY, "RGB", "420", fastdct=False)


def from_jpeg(content: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of what `to_jpeg` gave."""
    return simplejpeg.decode_jpeg(content, "RGB")
