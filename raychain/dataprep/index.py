"""An index of shards, written once so that no run has to read them before it begins."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from raychain import records
from raychain.core.json import Json
from raychain.core.storage import Folder
from raychain.data import health
from raychain.data.content import look
from raychain.data.index import INDEX, READ, SIZES, IndexRecord, add_sizes, base_name, folder_of, joined, save, shared
from raychain.data.members import Format
from raychain.data.shards import Shard, each_surveyed, indexed
from raychain.errors import InputError, without_secrets

PROBE = f"{INDEX}.tmp"
"""Written and removed again to see whether a folder can be written."""
SAVED_S = 60.0
"""How often what is known is written while shards are read: as much is lost when reading is interrupted."""
SHARE = 20
"""Writing takes at most one in so many seconds: that of 100,000 shards takes a quarter of a minute."""


def index_shards(addresses: Sequence[str], wanted: Format, out: str | None = None) -> Json:
    """Writes the index and open_clip's `sizes.json` beside the shards, or into the folder `out`: {`shards`, `samples`,
    `bytes`, `read` (shards that no index had as they are), `bad` (kind → how many), `folders`}.

    What indexes have of other shards, and of these in other formats, stays. Raises InputError for shards that cannot be
    read, for folders that cannot be written, before anything is read, and for shards of several folders that have one
    name, where `out` is to have the sizes of both.
    """
    parts: dict[str, list[str]] = {}
    for address in addresses:
        parts.setdefault(out or folder_of(address), []).append(address)
    for part in parts.values():
        _check_names(part)
    indexes = [_Index(folder, out is None) for folder in parts]
    found: list[Shard] = []
    with tempfile.TemporaryDirectory() as notes:
        for index, part in zip(indexes, parts.values(), strict=True):
            (Path(notes) / "counts").mkdir(exist_ok=True)
            with shared(out or index.folder.address, keep=False):
                for shard in each_surveyed(part, wanted, Path(notes), "SHARDS", exact=True, hashed=True):
                    health.name(shard.address, shard.bad)
                    index.add(shard, wanted)
                    found.append(shard)
            index.save()
    return {
        "shards": len(found),
        "samples": sum(shard.samples for shard in found),
        "bytes": sum(shard.size for shard in found),
        "read": sum(shard.source == READ for shard in found),
        "bad": dict(sum((Counter(shard.bad.counts) for shard in found), Counter()).most_common()),
        "folders": [without_secrets(index.folder.address) for index in indexes],
    }


def _check_names(addresses: Sequence[str]) -> None:
    """`sizes.json` knows shards by their names alone."""
    known: dict[str, str] = {}
    for address in addresses:
        other = known.setdefault(base_name(address), address)
        if other != address:
            raise InputError("SHARDS", f"{other} and {address}, which have one name",
                             f"shards whose names differ, as {SIZES} has them by name",
                             "index each folder with an --out of its own, or beside its shards")  # fmt: skip


class _Index:
    """The index in a folder while it grows."""

    def __init__(self, folder: str, beside: bool) -> None:
        self.folder, self._beside = Folder(folder), beside
        self._sizes: dict[str, int] = {}
        self._saved, self._took = time.monotonic(), 0.0
        try:
            found = records.take(self.folder, INDEX, IndexRecord)
            self.folder.write(PROBE, b"")
            self.folder.remove(PROBE)
        except OSError as error:
            where, allowed = "SHARDS" if beside else "--out", f"a folder that can be written ({error})"
            raise InputError(where, self.folder.address, allowed, "name another folder: --out") from None
        self._shards = {entry.address: entry for entry in found.shards} if found else {}

    def add(self, shard: Shard, wanted: Format) -> None:
        """Takes a shard in, and writes the index if that was not done for a while."""
        entry = indexed(shard, wanted)
        if entry is None:  # a file that was written just now, which a run would not rely on
            entry = indexed(replace(shard, version=look(shard.address).version), wanted)
        if entry is None:
            return
        name = base_name(shard.address) if self._beside else entry.address
        entry = entry.model_copy(update={"address": name})
        self._shards[name] = joined(self._shards.get(name), entry)
        self._sizes[base_name(shard.address)] = shard.samples
        if time.monotonic() - self._saved > max(SAVED_S, SHARE * self._took):
            self.save()

    def save(self) -> None:
        """Writes the index and the sizes. Raises OSError."""
        began = time.monotonic()
        save(self.folder, self._shards)
        if self._sizes:
            add_sizes(self.folder, self._sizes)
        self._saved = time.monotonic()
        self._took = self._saved - began
