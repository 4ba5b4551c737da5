"""Rows of tokens, as a loader reads them: L + 1 ids of consecutive tokens, in every pass from another offset.

T tokens of a shard, L tokens of a sample, n rows.
"""

from __future__ import annotations

import hashlib
import io
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from raychain.data.content import unchanged
from raychain.data.fetch import open_input
from raychain.data.health import Bad
from raychain.data.members import Report, Sample
from raychain.data.order import Rows, mix
from raychain.data.reader import Share
from raychain.data.shards import WHOLE_AHEAD, Shard
from raychain.data.table import CachedShard
from raychain.data.texts import BIN, documents, kind_of
from raychain.data.tokens import Tokenizer

RUN = 2**20
"""Tokens of a record batch."""
TOGETHER = 64
"""Documents that are tokenised at a time."""


def rows_of(tokens: int, length: int) -> int:
    """Samples of a shard: as many as there are whatever the offset, which is below `length`."""
    return max(0, (tokens - length) // length)


def token_runs(file: BinaryIO, kind: str, key: str, tokenizer: Tokenizer, report: Report) -> Iterator[np.ndarray]:
    """The token ids of an open file, piece by piece; after every document comes the end token.

    Raises OSError where the file cannot be read.
    """
    if kind == BIN:
        width = tokenizer.dtype.itemsize
        while content := file.read(RUN * width):
            yield np.frombuffer(content[: len(content) // width * width], tokenizer.dtype)
        return
    end = np.array([tokenizer.end], tokenizer.dtype)
    found = documents(file, kind, key, report)
    while texts := list(islice(found, TOGETHER)):
        yield from (np.concatenate([ids, end]) for ids in tokenizer.ids(texts))


@dataclass(frozen=True)
class TokenFormat:
    """The rows of a file with text or tokens: a `Format`."""

    kind: str
    key: str
    tokenizer: Tokenizer
    length: int

    @property
    def digest(self) -> str:
        """See Format."""
        return _hashed("rows-1", self.kind, self.key, self.tokenizer.digest, str(self.length))

    @property
    def remedy(self) -> str:
        """See Format."""
        return f"give longer texts, or lower task.length; in JSON and tables text is looked for under {self.key!r}"

    def __str__(self) -> str:
        return f"{self.length} tokens of text"

    def samples(self, file: BinaryIO, report: Report, *, names_only: bool = False) -> Iterator[Sample]:  # noqa: ARG002
        """See Format. Samples are rows of tokens, which have no content of their own."""
        if self.kind == BIN:
            tokens = file.seek(0, io.SEEK_END) // self.tokenizer.dtype.itemsize
        else:
            tokens = sum(map(len, token_runs(file, self.kind, self.key, self.tokenizer, report)))
        yield from ({"key": str(row)} for row in range(rows_of(tokens, self.length)))


class TokenTable(CachedShard):
    """The tokens of a cached shard."""

    def __init__(self, content: mmap.mmap | pa.Buffer, name: str, length: int) -> None:
        super().__init__(content, name)
        self._runs = [chunk.to_numpy() for chunk in self.data.column("tokens").chunks if len(chunk)]
        self.size = rows_of(self.data.num_rows, length)

    def slice(self, start: int, count: int) -> np.ndarray:
        """`count` ids from the token `start` on."""
        found = []
        while count:
            run, place = divmod(start, RUN)
            part = self._runs[run][place : place + count]
            found.append(part)
            start, count = start + len(part), count - len(part)
        return found[0] if len(found) == 1 else np.concatenate(found)


@dataclass(frozen=True)
class TokenReader:
    """Batches of `tokens`, int64 [n, L + 1], and `seed`, int64 [n]: a `Reader`."""

    tokenizer: Tokenizer
    key: str
    """What text is called in JSON and in tables."""
    length: int

    @property
    def digest(self) -> str:
        """See Reader. Samples of all lengths share the cached tokens."""
        return _hashed("tokens-1", self.key, self.tokenizer.digest)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See Reader."""
        return {"tokens": self.tokenizer.digest, "length": self.length, "text": self.key}

    @property
    def kept(self) -> str:
        """See Reader."""
        return str(self.tokenizer.dtype)

    @property
    def least_bytes(self) -> int:
        """See Reader."""
        return self.length * self.tokenizer.dtype.itemsize

    def decode(self, shard: Shard, bad: list[Bad]) -> Iterator[pa.RecordBatch]:
        """See Reader."""
        held: list[np.ndarray] = []
        count = total = 0
        with unchanged(shard), open_input(shard.address, WHOLE_AHEAD) as file:
            for ids in token_runs(file, kind_of(shard.address) or "txt", self.key, self.tokenizer, bad.append):
                held.append(ids)
                count, total = count + len(ids), total + len(ids)
                while count >= RUN:
                    joined = np.concatenate(held)
                    yield _batch(joined[:RUN])
                    held, count = [joined[RUN:]], count - RUN
        if rows_of(total, self.length) < 1:
            raise OSError(f"{shard.address}: its {total} tokens are fewer than two samples of {self.length}")
        if count:
            yield _batch(np.concatenate(held))

    def open(self, content: mmap.mmap | pa.Buffer, name: str) -> TokenTable:
        """See Reader."""
        return TokenTable(content, name, self.length)

    def read(self, rows: Rows, tables: Mapping[int, TokenTable], seed: int, share: Share) -> dict[str, np.ndarray]:  # noqa: ARG002
        """See Reader."""
        offset = (mix(seed, rows.passes, rows.shard) % np.uint64(self.length)).astype(np.int64)
        tokens = np.empty((len(rows.row), self.length + 1), np.int64)
        for i, (shard, row) in enumerate(zip(rows.shard.tolist(), rows.row.tolist(), strict=True)):
            table = tables[shard]
            tokens[i] = table.slice(int(offset[i]) + row % table.size * self.length, self.length + 1)
        return {"tokens": tokens, "seed": mix(seed, rows.passes, rows.shard, rows.row).view(np.int64)}


def _batch(ids: np.ndarray) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"tokens": pa.array(ids)})


def _hashed(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
