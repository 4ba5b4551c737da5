"""The rows of the shards that a rank reads, and their tables out of the cache. Arithmetic first, then the reading."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

from raychain.core.dist import rank_slice
from raychain.data import health
from raychain.data.cache import ShardCache
from raychain.data.pictures import PictureReader
from raychain.data.shards import Shard
from raychain.data.table import Table


@dataclass(frozen=True)
class Share:
    """A part of one shard: from `start` to `stop`, both as fractions of the shard."""

    shard: int
    start: Fraction
    stop: Fraction

    def rows(self, size: int) -> range:
        """The part's rows of a shard that has `size` rows; the parts of a shard cover all of them exactly once."""
        return range(int(self.start * size), int(self.stop * size))


def shares(counts: Sequence[int], rank: int, world: int) -> list[Share]:
    """The contiguous part of the shards that `rank` of `world` reads; `counts` are their samples as surveyed.

    Fractions, because unusable samples are found only when a shard is decoded: nobody need open the shards of others to
    know where its own part begins. Joined in the order of the ranks, the parts are all rows in the order of the shards.
    """
    block = rank_slice(sum(counts), rank, world)
    parts, first = [], 0
    for shard, count in enumerate(counts):
        start, stop = max(block.start - first, 0), min(block.stop - first, count)
        if start < stop:
            parts.append(Share(shard, Fraction(start, count), Fraction(stop, count)))
        first += count
    return parts


def tables(
    shards: Sequence[Shard], reader: PictureReader, cache: ShardCache, *, rank: int, world: int, threads: int
) -> Iterator[tuple[Table, range]]:
    """Each table with the rows that are this rank's, in order; `threads` shards are decoded ahead.

    Raises OSError for a shard that cannot be read.
    """
    ahead: deque[tuple[Share, Future[Table]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        for share in shares([shard.samples for shard in shards], rank, world):
            ahead.append((share, pool.submit(_read, shards[share.shard], reader, cache)))
            if len(ahead) > threads:
                yield _taken(*ahead.popleft())
        while ahead:
            yield _taken(*ahead.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read(shard: Shard, reader: PictureReader, cache: ShardCache) -> Table:
    table: Table = cache.table(shard, reader)
    health.name(shard.address, table.bad)
    health.note(shard.address, table.noted)
    return table


def _taken(share: Share, table: Future[Table]) -> tuple[Table, range]:
    return table.result(), share.rows(table.result().size)
