"""The tokeniser of a model: captions to token ids, with an identity for caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from open_clip.tokenizer import SimpleTokenizer


def make_tokenizer(config: dict[str, Any]) -> tuple[Callable[[Sequence[str]], np.ndarray], str]:
    """(captions → int [n, context length], identity) for a `model_cfg` with open_clip's own BPE tokeniser.

    `model_config` refuses models that need another tokeniser.
    """
    text = config["text_cfg"]
    length = int(text.get("context_length", 77))
    options = dict(text.get("tokenizer_kwargs") or {})
    tokenizer = _simple_tokenizer(length, tuple(sorted(options.items())))

    def tokenize(captions: Sequence[str]) -> np.ndarray:
        return tokenizer(list(captions)).numpy()

    return tokenize, f"open_clip-bpe|{length}|{sorted(options.items())}"


@lru_cache(maxsize=8)
def _simple_tokenizer(length: int, options: tuple[tuple[str, Any], ...]) -> SimpleTokenizer:
    return SimpleTokenizer(context_length=length, **dict(options))
