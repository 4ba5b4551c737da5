"""A shard's samples decoded, resized and tokenised into one Arrow table."""

from __future__ import annotations

import io
import logging
from typing import IO, TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image

from raychain.feed import members, shards
from raychain.feed.shards import Shard

if TYPE_CHECKING:
    from raychain.feed.cache import Spec, Tokenize

log = logging.getLogger("raychain.feed")

STORED_BEYOND_CROP = 1.15
"""With random crops the whole picture is kept, its shorter side this much larger than the crop's output."""


def _decode(shard: Shard, spec: Spec, tokenize: Tokenize, pixels: IO[bytes]) -> pa.Table:
    """The decoded shard; its pixels, gigabytes for thousands of large pictures, lie in the scratch file `pixels`."""
    keys: list[str] = []
    sizes: list[tuple[int, int]] = []
    labels: list[int] = []
    texts: list[list[str]] = []
    broken: list[str] = []
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
        keys.append(sample["key"])
        pixels.write(image.tobytes())
        sizes.append(image.shape[:2])
        labels.append(label)
        texts.append(captions)
    if broken:
        log.warning("%s: %d unusable samples skipped: %s", shard.address, len(broken), ", ".join(broken[:5]))
    if not keys:
        raise OSError(f"{shard.address}: none of its {shard.samples} samples can be read")
    pixels.flush()
    ends = np.cumsum([0, *(h * w * 3 for h, w in sizes)], dtype=np.int64)
    images = [None, pa.py_buffer(ends), pa.py_buffer(np.memmap(pixels, mode="r"))]
    tokens = _tokens([text for pool in texts for text in pool], tokenize)
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    return pa.table(
        {
            "key": pa.array(keys),
            "image": pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(keys), images),
            "height": pa.array([h for h, _ in sizes], pa.int32()),
            "width": pa.array([w for _, w in sizes], pa.int32()),
            "label": pa.array(labels, pa.int32()),
            "captions": pa.ListArray.from_arrays(offsets, tokens),
        }
    )


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
    image: Image.Image = Image.open(io.BytesIO(encoded))
    short = round(size * STORED_BEYOND_CROP) if whole else size
    if "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as below, without Pillow's warning
    if image.format == "JPEG":  # decode at 1/2, 1/4 or 1/8 where that still leaves twice the pixels that are wanted
        image.draft("RGB", (2 * short, 2 * short))
    image = image.convert("RGB")
    width, height = image.size
    if whole and min(width, height) <= short:
        return np.asarray(image)
    scaled = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    if not whole:
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)
