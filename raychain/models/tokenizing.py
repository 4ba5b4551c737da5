"""The tokeniser of a model: captions to token ids, with an identity for caches."""

from __future__ import annotations

import json
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
        ids: np.ndarray = _simple_tokenizer(self.context_length, json.dumps(dict(self.options)))(list(captions)).numpy()
        return ids


def make_tokenizer(config: Mapping[str, Any]) -> Bpe:
    """The tokeniser of a `model_cfg`; `model_config` refuses models that need another one than open_clip's own."""
    text = config["text_cfg"]
    options = dict(text.get("tokenizer_kwargs") or {})
    return Bpe(int(text.get("context_length", 77)), tuple(sorted(options.items())))


def check_tokenizer(config: Mapping[str, Any]) -> None:
    """Whether the tokeniser of a `model_cfg` can be made, and its text tower has an embedding for each of the tokens.

    Raises ValueError.
    """
    tokenize, known = make_tokenizer(config), config["text_cfg"].get("vocab_size", 49408)
    tokens = _simple_tokenizer(tokenize.context_length, json.dumps(dict(tokenize.options))).vocab_size
    if known < tokens:
        raise ValueError(f"text_cfg.vocab_size is {known:,}, and open_clip's tokenizer has {tokens:,} tokens")


@lru_cache(maxsize=8)
def _simple_tokenizer(length: int, options: str) -> SimpleTokenizer:
    """`options`, as JSON, are those of open_clip's `tokenizer_kwargs`. Raises ValueError where it takes no such."""
    try:
        return SimpleTokenizer(context_length=length, **json.loads(options))
    except Exception as error:  # special tokens are made part of a regular expression, among other things
        raise ValueError(
            f"text_cfg.tokenizer_kwargs: open_clip's tokenizer cannot be made of them ({error})"
        ) from error
