"""A shard decoded: pictures resized, captions tokenised, as one Arrow table."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from raychain.feed import members, shards
from raychain.feed.health import BOMB, UNREADABLE, Bad, Tally, Unusable, tally
from raychain.feed.shards import Shard

_BAD = b"raychain.bad"
Picture = TypeVar("Picture")
Tokenize = Callable[[Sequence[str]], np.ndarray]
"""Captions → token ids, integer [captions, context length], padded."""

FORMAT = 2
STORED_BEYOND_CROP = 1.15
"""With random crops the whole picture is kept, its shorter side this much larger than the crop's output."""


@dataclass(frozen=True)
class Spec:
    """What a cached shard holds; shards of different specs are different files."""

    wanted: members.Wanted
    image_size: int
    tokenizer: str
    """Identity of the tokeniser: name, vocabulary, context length."""
    cropped: bool = False
    """Keep the whole picture for random crops instead of the resized centre."""

    @property
    def digest(self) -> str:
        """Content address of the spec."""
        text = f"{FORMAT}|{self.wanted.digest}|{self.image_size}|{self.tokenizer}|{self.cropped}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def decode(shard: Shard, spec: Spec, tokenize: Tokenize, pixels: IO[bytes]) -> pa.Table:
    """The decoded shard; its pixels, gigabytes for thousands of large pictures, lie in the scratch file `pixels`.

    Samples that turn out unusable have no row; the schema's metadata tells of them (`bad_in`).
    Raises OSError for a shard that cannot be read, has changed since it was surveyed, or has no usable sample at all.
    """
    keys: list[str] = []
    sizes: list[tuple[int, int]] = []
    labels: list[int] = []
    texts: list[list[str]] = []
    bad: list[Bad] = []
    for sample in shards.read(shard, spec.wanted):
        try:
            captions, label = members.annotation(sample, spec.wanted)
            image = picture(resize, members.picture(sample), spec.image_size, spec.cropped)
        except Unusable as error:
            bad.append(Bad(error.kind, sample["key"], error.detail))
            continue
        keys.append(sample["key"])
        pixels.write(image.tobytes())
        sizes.append(image.shape[:2])
        labels.append(label)
        texts.append(captions)
    if len(keys) + len(bad) != shard.samples:
        raise OSError(f"{shard.address} has changed: {shard.samples} samples were counted, {len(keys) + len(bad)} read")
    if not keys:
        raise OSError(f"{shard.address}: none of its {shard.samples} samples can be used: {tally(bad)}")
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
        },
        metadata={_BAD: json.dumps(tally(bad).as_dict())},
    )


def bad_in(schema: pa.Schema) -> Tally:
    """The samples that a decoded shard lacks."""
    return Tally.from_dict(json.loads(schema.metadata[_BAD]))


def picture(decoder: Callable[..., Picture], *arguments: Any) -> Picture:
    """What `decoder` returns. Raises Unusable whatever that raises: for damaged pictures Pillow raises nearly all."""
    try:
        return decoder(*arguments)
    except Image.DecompressionBombError as error:
        raise Unusable(BOMB, str(error)) from None
    except UnidentifiedImageError:  # whose own message holds a memory address
        raise Unusable(UNREADABLE, "no picture that Pillow knows") from None
    except Exception as error:
        raise Unusable(UNREADABLE, str(error)) from None


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
