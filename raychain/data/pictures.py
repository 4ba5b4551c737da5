"""Pictures with captions or labels, as a loader reads them: the centre or a random crop, and captions drawn anew."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raychain.core.json import Json
from raychain.data.crops import crop_boxes
from raychain.data.decode import decode, scale_into
from raychain.data.device_crops import resized
from raychain.data.health import Bad
from raychain.data.memory import Recycled
from raychain.data.order import Rows, draw_captions, mix
from raychain.data.reader import Share
from raychain.data.shards import Shard
from raychain.data.spec import ASPECT, Spec, Tokenize
from raychain.data.table import Table

SHARED_FROM = 96
"""Pixels a side from which crops and JPEG are shared out to threads; below, Python's lock costs more than they gain."""

_memory = Recycled()


@dataclass(frozen=True)
class PictureReader:
    """Batches of `images`, uint8 [n, H, W, 3], of `tokens`, int64 [n, per_image, context length], if captions are
    wanted, of `label`, int64 [n], if labels are, and of `seed`, int64 [n].
    """

    spec: Spec
    """What the cache holds."""
    tokenize: Tokenize | None = None
    """Needed for captions."""
    per_image: int = 1
    """Captions of a picture in a batch."""
    crop: tuple[float, float] | None = None
    """Area range of the random crop; None: the centre."""
    on_device: bool = False
    """Random crops are resized, and mirrored, by `finish`: instead of `images`, batches from `read` have `window`,
    uint8 [n, P, P, 3], with a crop in the upper left corner, `side`, int64 [n, 2], its height and width, and `mirror`,
    bool [n].
    """

    @property
    def digest(self) -> str:
        return self.spec.digest

    @property
    def identity(self) -> Mapping[str, Any]:
        wanted, captions = self.spec.wanted, {"keys": list(self.spec.wanted.captions), "per_image": self.per_image}
        found: Json = {"crop": self.crop, "pixels": self.spec.pixels}
        found |= {"captions": captions} if wanted.captions else {}
        found |= {"label": True} if wanted.label else {}
        found |= {"augment_on": "device"} if self.on_device else {}
        return found | ({} if wanted.key_split == "first" else {"key_split": wanted.key_split})

    @property
    def kept(self) -> str:
        return self.spec.pixels

    @property
    def least_bytes(self) -> int:
        return 0 if self.spec.cropped or self.spec.pixels == "jpeg" else self.spec.pixel_bytes

    def decode(self, shard: Shard, bad: list[Bad]) -> Iterator[pa.RecordBatch]:
        return decode(shard, self.spec, self.tokenize or _none, bad)

    def open(self, content: mmap.mmap | pa.Buffer, name: str) -> Table:
        return Table(content, name)

    def read(self, rows: Rows, tables: Mapping[int, Table], seed: int, share: Share) -> dict[str, np.ndarray]:
        place = [(tables[s], r % tables[s].size) for s, r in zip(rows.shard.tolist(), rows.row.tolist(), strict=True)]
        columns = {"seed": mix(seed, rows.passes, rows.shard, rows.row).view(np.int64)}
        if self.spec.wanted.captions:
            columns["tokens"] = self._tokens(rows, place, seed)
        if self.spec.wanted.label:
            columns["label"] = np.array([table.label[r] for table, r in place], np.int64)
        return columns | (self._windows if self.on_device else self._images)(rows, place, seed, share)

    def finish(self, columns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The columns with `images` in place of the windows."""
        if not self.on_device:
            return dict(columns)
        rest = {name: column for name, column in columns.items() if name not in ("window", "side", "mirror")}
        images = resized(columns["window"], columns["side"], columns["mirror"], self.spec.image_size)
        return rest | {"images": images}

    def _tokens(self, rows: Rows, place: list[tuple[Table, int]], seed: int) -> np.ndarray:
        first = np.array([table.caption_offset[r] for table, r in place])
        pool = np.array([table.caption_offset[r + 1] for table, r in place]) - first
        chosen = first[:, None] + draw_captions(seed, rows, pool, self.per_image)
        tokens = np.empty((*chosen.shape, place[0][0].tokens.shape[1]), dtype=np.int64)
        for i, (table, _) in enumerate(place):
            tokens[i] = table.tokens[chosen[i]]
        return tokens

    def changed(self, image: np.ndarray, seed: int) -> np.ndarray:  # noqa: ARG002 - for subclasses
        """A sample's picture, uint8 [H, W, 3], read-only, as it comes into a batch."""
        return image

    def mirrored(self, seed: int) -> bool:  # noqa: ARG002 - for subclasses
        """Whether a sample's picture is mirrored, where that is done on the device."""
        return False

    def _windows(self, rows: Rows, place: list[tuple[Table, int]], seed: int, share: Share) -> dict[str, np.ndarray]:
        """See `on_device`. Windows of longer sides than usual photographs have are resized here."""
        size = self.spec.image_size
        padded = math.ceil(ASPECT * self.spec.beyond * size)
        windows, side = _memory.empty((len(place), padded, padded, 3)), np.full((len(place), 2), size)
        boxes, seeds = self._boxes(rows, place, seed).tolist(), mix(seed, rows.passes, rows.shard, rows.row).tolist()
        target = torch.from_numpy(windows).permute(0, 3, 1, 2)

        def fill(part: int, parts: int) -> None:
            for i in range(part, len(place), parts):
                (table, r), (_, _, height, width) = place[i], boxes[i]
                window = table.window(r, *boxes[i])
                if max(height, width) > padded:
                    small = torch.empty((1, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
                    scale_into(small, window)
                    window = small
                else:
                    side[i] = height, width
                target[i : i + 1, :, : window.shape[2], : window.shape[3]] = window

        if self.spec.pixels == "raw" or size < SHARED_FROM:
            fill(0, 1)
        else:
            share(fill)
        return {"window": windows, "side": side, "mirror": np.array([self.mirrored(s) for s in seeds], bool)}

    def _images(self, rows: Rows, place: list[tuple[Table, int]], seed: int, share: Share) -> dict[str, np.ndarray]:
        size = self.spec.image_size
        images = _memory.empty((len(place), size, size, 3))
        boxes, seeds = self._boxes(rows, place, seed).tolist(), mix(seed, rows.passes, rows.shard, rows.row).tolist()
        target = torch.from_numpy(images).permute(0, 3, 1, 2)

        def fill(part: int, parts: int) -> None:
            for i in range(part, len(place), parts):
                table, r = place[i]
                if self.crop is None:
                    image = table.image(r)
                else:
                    image = images[i]
                    scale_into(target[i : i + 1], table.window(r, *boxes[i]))
                if (changed := self.changed(image, seeds[i])) is not image or self.crop is None:
                    images[i] = changed

        if size < SHARED_FROM or (self.crop is None and self.spec.pixels == "raw"):
            fill(0, 1)
        else:
            share(fill)
        return {"images": images}

    def _boxes(self, rows: Rows, place: list[tuple[Table, int]], seed: int) -> np.ndarray:
        """The rows' crops, int64 [n, 4], or [0, 4] without crops."""
        if self.crop is None:
            return np.empty((0, 4), np.int64)
        seeds = mix(seed, rows.passes, rows.shard, rows.row, 1 << 20)
        height, width = (np.array(side) for side in zip(*((t.height[r], t.width[r]) for t, r in place), strict=True))
        return crop_boxes(height, width, self.crop, seeds)


def _none(_: Sequence[str]) -> np.ndarray:
    raise ValueError("captions are wanted, and there is no tokeniser")
