"""What a loader, the cache and the preloader ask of a kind of data: shards into tables, tables into batches."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from raychain.data.health import Bad, Tally
from raychain.data.order import Rows
from raychain.data.shards import Shard

if TYPE_CHECKING:
    import torch

Share = Callable[[Callable[[int, int], None]], None]
"""Runs a function on several threads at once: `work(part, parts)` for every part."""


class Table(Protocol):
    """A decoded shard, mapped into memory."""

    size: int
    """Its samples."""
    bad: Tally
    """Samples that turned out unusable and have no row."""
    mapped: bool
    """Whether it holds a file of the cache, not memory."""


class Reader(Protocol):
    """One kind of data, with the recipe that turns a row into a sample. It is picklable: it travels to the workers."""

    @property
    def digest(self) -> str:
        """Content address of what a cached shard holds; with the shard's identity it is the cached file's name."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that determines a batch besides shards and order, in JSON's types: part of a stage's key."""

    @property
    def kept(self) -> str:
        """How the cache keeps samples, as the line that opens a stage says it."""

    @property
    def least_bytes(self) -> int:
        """Bytes that a sample takes in the cache at least, as far as that is known before it is decoded."""

    def decode(self, shard: Shard, bad: list[Bad]) -> Iterator[pa.RecordBatch]:
        """The decoded shard in record batches. Unusable samples have no row and are added to `bad`.

        Raises OSError for a shard that cannot be read, has changed since it was surveyed, or has no usable sample.
        """

    def open(self, content: mmap.mmap | pa.Buffer, name: str) -> Any:
        """The table of an Arrow file of those batches (`Table`, with whatever `read` needs).

        Raises DamagedError for a file that is not the one of that name.
        """

    def read(self, rows: Rows, tables: Mapping[int, Any], seed: int, share: Share) -> dict[str, np.ndarray]:
        """The columns of n rows of the windows whose tables are held, each [n, …].

        `seed` is the data order's: what is drawn for a sample follows from it, the pass, the shard and the row.
        """


@runtime_checkable
class Joining(Protocol):
    """A reader that changes samples by their neighbours in the global batch, once all of a rank's part is read."""

    @property
    def together(self) -> int:
        """Samples in a row, counted from the global batch's first, that change one another: they stay on one rank."""

    def join(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The columns of a rank's part of a batch, in order, after the change."""


@runtime_checkable
class Finishing(Protocol):
    """A reader that leaves a part of the work to the device that a batch is trained on."""

    def finish(self, columns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The columns that the objective reads, of those that `read` gave, which are on the device by now."""
