"""The loss of a language model on held-out text: nats a token, perplexity, and bits a byte.

The documents follow one another with the end token after each, and one before the first. The model reads them in
pieces of as many tokens as it was trained on, each by itself; every token is predicted once, also the end tokens. The
loss is the mean over the tokens; bits a byte are the sum over the bytes of the text in UTF-8, whatever the tokeniser.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from raychain.core.storage import Folder
from raychain.data.addresses import expand
from raychain.data.content import identify, unchanged
from raychain.data.fetch import open_input
from raychain.data.health import Bad
from raychain.data.shards import Shard
from raychain.data.texts import BIN, documents
from raychain.data.token_files import known_kind, read_note
from raychain.data.token_rows import token_runs
from raychain.data.tokens import Tokenizer
from raychain.errors import InputError
from raychain.evaluators.context import Context
from raychain.models.next_token import hidden_states, token_losses

TOKENS = 2**14
"""Tokens that are read at a time."""


class Held(NamedTuple):
    """Held-out text in tokens, int64 [T], and its bytes."""

    ids: torch.Tensor
    bytes: int


@dataclass(frozen=True)
class PerplexityData:
    """What is measured; it goes to the workers as it is."""

    shards: tuple[Shard, ...]
    kinds: tuple[str, ...]
    key: str

    @property
    def digest(self) -> str:
        """See HeldOut."""
        content = "\n".join(("perplexity-1", self.key, *(shard.identity for shard in self.shards)))
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    @property
    def samples(self) -> int:
        """KiB of the files: how many tokens they make, the model's tokeniser decides."""
        return max(1, sum(shard.size for shard in self.shards) // 1024)

    def run(self, model: nn.Module, context: Context) -> dict[str, float]:
        """See HeldOut."""
        assert context.words is not None, "only models that read tokens are measured by it"
        held = _read(self, context.words)
        length = context.image_size
        count, world = len(held.ids) - 1, context.world
        rows = -(-count // length)
        own = world.part(rows)
        batch, total = max(1, TOKENS // length), torch.zeros((), dtype=torch.float64, device=context.device)
        for first in range(own.start, own.stop, batch):
            for piece in _pieces(held.ids, first, min(first + batch, own.stop), length):
                ids = piece.to(context.device)
                total += token_losses(model, hidden_states(model, ids[:, :-1]), ids[:, 1:]).double().sum()
            done = (min(first + batch, own.stop) - own.start) / max(1, own.stop - own.start)
            context.progress(round(self.samples * done))
        nats = float(world.sum(total))
        if not math.isfinite(nats):
            raise FloatingPointError("the model's losses on held-out text are not finite")
        found = {"loss": nats / count, "bits_per_byte": nats / math.log(2) / held.bytes}
        return found | {"perplexity": math.exp(min(nats / count, 700.0))}


def _pieces(ids: torch.Tensor, start: int, stop: int, length: int) -> list[torch.Tensor]:
    """The rows start … stop as tensors [rows, tokens + 1]; the last row of all may be shorter, and is by itself."""
    whole = min(stop, (len(ids) - 1) // length)
    found = []
    if whole > start:
        places = torch.arange(start, whole)[:, None] * length + torch.arange(length + 1)
        found.append(ids[places])
    if whole < stop:
        found.append(ids[whole * length :][None])
    return found


@lru_cache(maxsize=4)
def _read(data: PerplexityData, tokenizer: Tokenizer) -> Held:
    """The tokens of all files. Raises OSError where one cannot be read or was made by another tokeniser."""
    end, runs, size = np.array([tokenizer.end], np.int64), [], 0
    for shard, kind in zip(data.shards, data.kinds, strict=True):
        bad: list[Bad] = []
        with unchanged(shard), open_input(shard.address) as file:
            if kind == BIN:
                size += _noted(shard.address, tokenizer)
            else:
                size += sum(len(text.encode()) for text in documents(file, kind, data.key, bad.append))
                file.seek(0)
            runs += [ids.astype(np.int64) for ids in token_runs(file, kind, data.key, tokenizer, lambda _: None)]
    if not size:
        raise OSError(f"{data.shards[0].address}: there is no text in it")
    return Held(torch.from_numpy(np.concatenate([end, *runs])), size)


def _noted(address: str, tokenizer: Tokenizer) -> int:
    """Bytes of the text behind a file of tokens. Raises OSError where they are another tokeniser's."""
    try:
        note = read_note(address, "evaluate")
    except InputError as error:
        raise OSError(str(error)) from None
    if note.tokenizer != tokenizer.digest:
        raise OSError(f"{address} holds tokens of another tokenizer than the model's")
    return note.bytes


def resolve_perplexity(addresses: Sequence[str], key: str, cache: Path, where: str) -> PerplexityData:
    """Finds and identifies the files. Raises InputError."""
    counts, shards, kinds = Folder(str(cache / "counts")), [], []
    for address in expand(addresses, where):
        kinds.append(known_kind(address, where))
        if kinds[-1] == BIN:
            read_note(address, where)
        try:
            content = identify(address, counts)
        except OSError as error:
            raise InputError(where, address, "a file that can be read", f"replace or remove it ({error})") from None
        shards.append(Shard(address, content.size, content.identity, 0, version=content.version))
    return PerplexityData(tuple(shards), tuple(kinds), key)
