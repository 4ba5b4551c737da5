"""What evaluators are given beside the model: how its pictures and texts are prepared, where to compute, with whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from raychain.data.cache import ShardCache
from raychain.data.spec import Resizing, Tokenizer
from raychain.data.tokens import Tokenizer as Words
from raychain.evaluators.encoding import Encoder
from raychain.evaluators.ranks import World


@dataclass(frozen=True)
class Context:
    """All of a measurement but the model and the held-out data."""

    cache: ShardCache
    """Decoded pictures, on this node."""
    tokenize: Tokenizer | None
    """Texts to token ids [n, L]; None: the model takes none."""
    image_size: int
    """Pixels a side, or tokens."""
    mean: tuple[float, ...]
    """Mean of each channel, in 0 … 1; `std` likewise."""
    std: tuple[float, ...]
    device: torch.device
    world: World = World()  # noqa: RUF009 - frozen
    """Who shares the work."""
    batch_size: int = 256
    """Pictures or texts encoded at a time."""
    words: Words | None = None
    """Text to the ids of a language model, which reads `image_size` tokens; None: the model is none."""
    resizing: Resizing = Resizing()  # noqa: RUF009 - frozen
    """How pictures get to their size."""
    progress: Callable[[int], None] = lambda _: None
    """Hears after every batch how many pictures this rank has read for a task; what it raises ends the measurement."""

    def encoder(self, model: nn.Module) -> Encoder:
        """Pictures and texts to the model's features, batch by batch."""
        return Encoder(
            model,
            self.cache,
            self.tokenize,
            image_size=self.image_size,
            mean=self.mean,
            std=self.std,
            device=self.device,
            world=self.world,
            batch_size=self.batch_size,
            resizing=self.resizing,
            progress=self.progress,
        )
