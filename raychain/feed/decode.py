"""A shard's samples decoded, resized and tokenised into Arrow record batches; pictures between JPEG and pixels."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

from raychain.feed import members, shards
from raychain.feed.shards import Shard
from raychain.feed.spec import QUALITY, STORED_BEYOND_CROP, Spec, Tokenize

log = logging.getLogger("raychain.feed")

BATCH_BYTES = 2**25
"""Of pictures in a record batch; that many are in memory at once."""
VECTORISED = torch.backends.cpu.get_cpu_capability().startswith("AVX")
"""Whether torch resizes bytes with vector instructions, five times faster than Pillow; elsewhere it is slower."""


def _decode(shard: Shard, spec: Spec, tokenize: Tokenize) -> Iterator[pa.RecordBatch]:
    """The decoded shard, about BATCH_BYTES at a time."""
    rows: list[dict[str, Any]] = []
    texts: list[list[str]] = []
    broken: list[str] = []
    found = held = 0
    for sample in shards.read(shard, spec.wanted):
        try:
            image = resize(members.picture(sample), spec.image_size, spec.cropped)
            captions = members.captions(sample, spec.wanted.captions)
            label = int(sample["cls"]) if spec.wanted.label else -1
            if spec.wanted.captions and not captions:
                raise ValueError("no caption")
        except Exception as error:  # damaged pictures raise nearly anything in Pillow
            broken.append(f"{sample['key']} ({error})")
            continue
        content = image.tobytes() if spec.pixels == "raw" else to_jpeg(image)
        height, width = image.shape[:2]
        rows.append({"key": sample["key"], "image": content, "height": height, "width": width, "label": label})
        texts.append(captions)
        found, held = found + 1, held + len(content)
        if held >= BATCH_BYTES:
            yield _record_batch(rows, texts, tokenize)
            rows, texts, held = [], [], 0
    if broken:
        log.warning("%s: %d unusable samples skipped: %s", shard.address, len(broken), ", ".join(broken[:5]))
    if not found:
        raise OSError(f"{shard.address}: none of its {shard.samples} samples can be read")
    if rows:
        yield _record_batch(rows, texts, tokenize)


COLUMNS = {
    "key": pa.string(),
    "image": pa.large_binary(),
    "height": pa.int32(),
    "width": pa.int32(),
    "label": pa.int32(),
}


def _record_batch(rows: list[dict[str, Any]], texts: list[list[str]], tokenize: Tokenize) -> pa.RecordBatch:
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in COLUMNS.items()}
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
    if width <= height:
        height, width = int(short * height / width), short
    else:
        height, width = short, int(short * width / height)
    pixels = scale(pixels, height, width)
    if whole:
        return pixels
    left, top = round((width - size) / 2), round((height - size) / 2)
    return pixels[top : top + size, left : left + size]


def _pixels(encoded: bytes, least: int) -> np.ndarray:
    """uint8 [H, W, 3]. JPEG is decoded at 1/2 or less of its size where that leaves `least` pixels a side."""
    if encoded.startswith(b"\xff\xd8"):
        with contextlib.suppress(ValueError):  # four colours, or damaged: Pillow converts it, or says what is wrong
            return simplejpeg.decode_jpeg(encoded, "RGB", min_height=least, min_width=least, min_factor=2)
    image: Image.Image = Image.open(io.BytesIO(encoded))
    if "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as below, without Pillow's warning
    return np.array(image.convert("RGB"))


def scale(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] (contiguous, writable) resized: bicubic with antialiasing, within a level of Pillow's."""
    if pixels.shape[:2] == (height, width):
        return pixels
    if not VECTORISED:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    x_13HW = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    scaled = F.interpolate(x_13HW, (height, width), mode="bicubic", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


def to_jpeg(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as JPEG of quality QUALITY, colour at half resolution."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), QUALITY, "RGB", "420", fastdct=False)


def from_jpeg(content: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of what `to_jpeg` gave."""
    return simplejpeg.decode_jpeg(content, "RGB")
