"""Tokenisers of Hugging Face's `tokenizers`, in files `tokenizer.json`, and the one that takes bytes as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from raychain.core.extras import language_library
from raychain.core.storage import below
from raychain.data.fetch import open_input
from raychain.errors import InputError

BYTES = "bytes"
"""The name of the tokeniser without a file: token b is the byte b."""
END = "<|endoftext|>"
LARGEST = 2**26
"""Bytes of the largest file that is read as a tokeniser."""
FILE = "tokenizer.json"


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids. It travels to workers as an address, from which they read the same content."""

    address: str
    """`bytes`, or where its tokenizer.json is."""
    end_token: str
    """What stands between documents."""
    digest: str
    """Hash of its content and of the end token."""

    @cached_property
    def content(self) -> str:
        """The tokenizer.json. Raises OSError where it is no longer the one that was read first."""
        content = _content(self.address)
        if _digest(content, self.end_token) != self.digest:
            raise OSError(f"{self.address} has changed since the run began")
        return content

    def __getstate__(self) -> dict[str, str]:
        return {"address": self.address, "end_token": self.end_token, "digest": self.digest}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__.update(state)

    @property
    def size(self) -> int:
        """Rows that a token table needs."""
        return 257 if self.address == BYTES else _rows(self.content)

    @property
    def end(self) -> int:
        """The id of the end token."""
        return 256 if self.address == BYTES else int(_parsed(self.content).token_to_id(self.end_token))

    @property
    def dtype(self) -> np.dtype[Any]:
        """How ids are kept."""
        return np.dtype(np.uint16 if self.size <= 2**16 else np.uint32)

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, without the end token."""
        if self.address == BYTES:
            return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]
        found = _parsed(self.content).encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in found]

    def words(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        if self.address == BYTES:
            return bytes(i for i in ids if i < 256).decode(errors="replace")
        return str(_parsed(self.content).decode(list(ids)))


def read_tokenizer(address: str, end_token: str = END, where: str = "task.tokenizer") -> Tokenizer:
    """The tokeniser at an address: a `tokenizer.json` or a folder with one, local or on object storage; or `bytes`.

    Raises InputError, naming the option `where`.
    """
    if address == BYTES:
        if end_token != END:
            raise InputError("task.end", end_token, f"{END} with the tokenizer {BYTES}", "leave it out")
        return Tokenizer(BYTES, END, _digest("", END))
    file = address if address.endswith(".json") else below(address, FILE)
    try:
        content = _content(file)
        parsed = _parsed(content)
    except InputError:
        raise
    except Exception as error:  # a file's bytes may be anything, and tokenizers raises plain Exception
        raise InputError(where, address, f"bytes, or a {FILE} of Hugging Face's tokenizers, or its folder",
                         f"correct the path, or make one: raychain data tokenize --vocabulary 4096 ({error})"
                         ) from None  # fmt: skip
    if parsed.token_to_id(end_token) is None:
        special = ", ".join(token.content for token in parsed.get_added_tokens_decoder().values() if token.special)
        raise InputError(
            "task.end", end_token, f"a token of {address}: {special[:300]}", "name the one between documents"
        )
    return Tokenizer(file, end_token, _digest(content, end_token))


def _content(address: str) -> str:
    if address == BYTES:
        return ""
    with open_input(address) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise OSError(f"{address} has more than {LARGEST} bytes")
    return content.decode()


@lru_cache(maxsize=8)
def _parsed(content: str) -> Any:
    return language_library("tokenizers").Tokenizer.from_str(content)


@lru_cache(maxsize=8)
def _rows(content: str) -> int:
    return int(max(_parsed(content).get_vocab(True).values())) + 1


def _digest(content: str, end_token: str) -> str:
    return hashlib.sha256(json.dumps([content, end_token]).encode()).hexdigest()[:32]


def bytes_content() -> str:
    """The tokeniser of bytes as a `tokenizer.json`, for libraries that read one."""
    library = language_library("tokenizers")
    chars = library.pre_tokenizers.ByteLevel.alphabet()
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    of_byte = [chr(b) if b in printable else chr(next(others)) for b in range(256)]
    assert set(of_byte) == set(chars)
    made = library.Tokenizer(library.models.BPE({char: byte for byte, char in enumerate(of_byte)}, []))
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = library.decoders.ByteLevel()
    made.add_special_tokens([END])
    return str(made.to_str())


def trained_content(texts: Any, size: int) -> str:
    """A byte-level BPE of `size` tokens, trained on an iterable of texts, as a `tokenizer.json`."""
    library = language_library("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    trainer = library.trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return str(made.to_str())
