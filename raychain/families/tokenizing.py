"""The tokeniser of a model: captions to token ids, with an identity for caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from open_clip.tokenizer import SimpleTokenizer


@dataclass(frozen=True)
class Bpe:
    """open_clip's own BPE tokeniser; its vocabulary is read when it is first called, in whichever process that is."""

    context_length: int
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def identity(self) -> str:
        """Its name and settings, by which cached token ids are told apart."""
        return f"open_clip-bpe|{self.context_length}|{list(self.options)}"

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Token ids, int [captions, context length], padded."""
        ids: np.ndarray = _simple_tokenizer(self.context_length, self.options)(list(captions)).numpy()
        return ids


def make_tokenizer(config: Mapping[str, Any]) -> Bpe:
    """The tokeniser of a `model_cfg`; `model_config` refuses models that need another one than open_clip's own."""
    text = config["text_cfg"]
    options = dict(text.get("tokenizer_kwargs") or {})
    return Bpe(int(text.get("context_length", 77)), tuple(sorted(options.items())))


@lru_cache(maxsize=8)
def _simple_tokenizer(length: int, options: tuple[tuple[str, Any], ...]) -> SimpleTokenizer:
    return SimpleTokenizer(context_length=length, **dict(options))
