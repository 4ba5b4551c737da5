"""Files of token ids: nanoGPT's layout, with a JSON file beside each that says what is in it; and finding them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from raychain.data.fetch import open_input
from raychain.data.shards import Shard, each_surveyed
from raychain.data.texts import BIN, KINDS, kind_of
from raychain.data.token_rows import TokenFormat
from raychain.data.tokens import Tokenizer
from raychain.errors import InputError

NOTE_BYTES = 2**16


class Note(NamedTuple):
    """What NAME.bin.json says of NAME.bin."""

    tokens: int
    dtype: str
    tokenizer: str
    """`Tokenizer.digest`."""
    documents: int
    bytes: int
    """Bytes of the text, in UTF-8."""


def read_note(address: str, where: str) -> Note:
    """The note beside a file of tokens. Raises InputError."""
    allowed = f"a {BIN} file with a {address.rpartition('/')[2]}.json beside it, as raychain data tokenize writes both"
    try:
        with open_input(f"{address}.json") as file:
            found = json.loads(file.read(NOTE_BYTES))
        tokens, texts, size = (int(found[name]) for name in ("tokens", "documents", "bytes"))
        return Note(tokens, str(found["dtype"]), str(found["tokenizer"]), texts, size)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(where, address, allowed, f"make it anew from the text ({error!r})") from None


def known_kind(address: str, where: str) -> str:
    """The kind of a file with text or tokens. Raises InputError for others."""
    if (kind := kind_of(address)) is None:
        raise InputError(where, address, f"files that end in {', '.join(f'.{end}' for end in KINDS)}",
                         "give files of text, or of tokens (raychain data tokenize)")  # fmt: skip
    return kind


def check_tokens(address: str, tokenizer: Tokenizer, where: str) -> None:
    """InputError where a file of tokens was made by another tokeniser."""
    note = read_note(address, where)
    if note.tokenizer != tokenizer.digest or note.dtype != str(tokenizer.dtype):
        raise InputError(where, address, f"tokens of task.tokenizer, {tokenizer.address} with {tokenizer.end_token}",
                         "name the tokenizer that they were made with, or make them anew")  # fmt: skip


def surveyed(
    addresses: Sequence[str], key: str, tokenizer: Tokenizer, length: int, cache: Path, where: str
) -> list[Shard]:
    """The shards in their order with their rows of `length` tokens. Text is tokenised once to be counted, and once on
    every node when it is read; files of tokens are counted by their size.

    Raises InputError for files that cannot be read or are of no known kind, and if none has a row.
    """
    kinds = [known_kind(address, where) for address in addresses]
    found: dict[str, Shard] = {}
    for kind in dict.fromkeys(kinds):
        own = [address for address, other in zip(addresses, kinds, strict=True) if other == kind]
        if kind == BIN:
            for address in own:
                check_tokens(address, tokenizer, where)
        found |= {s.address: s for s in each_surveyed(own, TokenFormat(kind, key, tokenizer, length), cache, where)}
    shards = [found[address] for address in addresses]
    if not any(shard.samples for shard in shards):
        problem = next((str(shard.bad) for shard in shards if shard.bad), "they are shorter")
        wanted = TokenFormat(kinds[0], key, tokenizer, length)
        raise InputError(where, f"{len(shards)} files without a sample ({problem})", f"at least {wanted} in a file",
                         wanted.remedy)  # fmt: skip
    return shards
