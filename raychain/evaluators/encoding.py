"""Rows and token ids to features. b rows of a batch, D features, H = W pixels a side, L context length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from raychain.data.cache import ShardCache
from raychain.data.members import Wanted
from raychain.data.pictures import PictureReader
from raychain.data.shards import Shard
from raychain.data.spec import Resizing, Spec, Tokenizer
from raychain.data.table import Table
from raychain.evaluators.ranks import World
from raychain.evaluators.reading import tables


class Encoder:
    """A model with everything that stands between shards and its features.

    Pictures pass through two buffers that are made once: fresh memory for every batch costs a CPU more than filling it.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: ShardCache,
        tokenize: Tokenizer | None,
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        world: World,
        batch_size: int,
        resizing: Resizing,
        progress: Callable[[int], None],
    ) -> None:
        self.model: Any = model
        self.cache, self._tokenize = cache, tokenize
        self.image_size, self.device, self.world, self.batch_size = image_size, device, world, batch_size
        self.resizing, self.progress, self.seen = resizing, progress, 0
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device).view(3, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32, device=device).view(3, 1, 1)
        self._pixels = np.empty((batch_size, image_size, image_size, 3), dtype=np.uint8)
        self._input = torch.empty((batch_size, 3, image_size, image_size), device=device)

    def tables(self, shards: Sequence[Shard], wanted: Wanted) -> Iterator[tuple[Table, range]]:
        """This rank's part of the shards: each table with the rows that are its own."""
        # pictures alone are one file for all tokenisers
        tokenizer = self._tokenize.identity if wanted.captions and self._tokenize else ""
        return tables(
            shards,
            PictureReader(Spec(wanted, self.image_size, tokenizer, exactly=self.resizing), self._tokenize),
            self.cache,
            rank=self.world.rank,
            world=self.world.size,
            threads=max(1, torch.get_num_threads()),
        )

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids [n, L]. Raises ValueError where the model takes no texts."""
        if self._tokenize is None:
            raise ValueError("the model takes no texts")
        return self._tokenize(texts)

    def batches(self, rows: range) -> Iterator[range]:
        """The rows in runs of `batch_size` at most."""
        for start in range(rows.start, rows.stop, self.batch_size):
            yield range(start, min(start + self.batch_size, rows.stop))

    def images(self, table: Table, rows: range) -> torch.Tensor:
        """Normalised features [b, D] of at most `batch_size` rows, preprocessed as open_clip's evaluation does.

        Raises FloatingPointError where they are not finite; so do `texts` and `scores`.
        """
        return _finite(image_features(self.model, self._pixels_of(table, rows)), "pictures")

    def scores(self, table: Table, rows: range) -> torch.Tensor:
        """The model's scores [b, C] of classes, of rows as for `images`."""
        found: torch.Tensor = self.model(self._pixels_of(table, rows))
        return _finite(found.float(), "classes")

    def _pixels_of(self, table: Table, rows: range) -> torch.Tensor:
        for i, row in enumerate(rows):
            self._pixels[i] = table.image(row)
        x_b3HW = self._input[: len(rows)]
        x_b3HW.copy_(torch.from_numpy(self._pixels[: len(rows)]).to(self.device).permute(0, 3, 1, 2))
        x_b3HW.div_(255).sub_(self._mean).div_(self._std)
        self.seen += len(rows)
        self.progress(self.seen)
        return x_b3HW

    def texts(self, tokens: np.ndarray) -> torch.Tensor:
        """Normalised features [n, D] of token ids [n, L], n ≥ 1, encoded `batch_size` at a time."""
        parts = []
        for batch in self.batches(range(len(tokens))):
            ids = torch.from_numpy(tokens[batch.start : batch.stop].astype(np.int64)).to(self.device)
            parts.append(self.model.encode_text(ids, normalize=True).float())
            self.progress(self.seen)
        return _finite(torch.cat(parts), "texts")


def image_features(model: Any, x_b3HW: torch.Tensor) -> torch.Tensor:
    """Normalised fp32 features [b, D] of pictures: open_clip's embedding, or what a timm model's classifier gets."""
    if hasattr(model, "encode_image"):
        found: torch.Tensor = model.encode_image(x_b3HW, normalize=True)
        return found.float()
    return F.normalize(model.forward_head(model.forward_features(x_b3HW), pre_logits=True).float(), dim=-1)


def _finite(features: torch.Tensor, of: str) -> torch.Tensor:
    """The features; FloatingPointError if some are not finite, of which a metric would be a number all the same."""
    if not features.isfinite().all():
        raise FloatingPointError(f"the model cannot be measured: its features of {of} are not finite")
    return features
