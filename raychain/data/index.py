"""What is known of shards without reading them: raychain's index, open_clip's sizes, img2dataset's statistics.

The index has the content hash of every shard, so keys stay where shards are copied, and is trusted for a shard whose
size and version (the ETag, or the time stamps of a local file) are those of when it was written. The other files hold
counts alone, which nothing ties to a shard's content: they stand in where counting would mean reading.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from raychain import records
from raychain.core.record import Record, Version, Versioned
from raychain.core.storage import PIPE, WEB, Folder, is_command, is_local, resolve, split_options
from raychain.core.wording import several
from raychain.data.content import Content, short_hash
from raychain.data.fetch import patiently
from raychain.errors import InputError, without_secrets
from raychain.records import Count, TallyRecord

log = logging.getLogger("raychain.data")

INDEX, SIZES, KEPT = "raychain-index.json", "sizes.json", "counts"
"""The index, open_clip's file, and the folder of a storage with what its runs have counted."""
FROM_INDEX, FROM_SIZES, FROM_STATS, FROM_PARQUET = (
    "from the index",
    "from sizes.json",
    "from _stats.json",
    "from parquet",
)
BEFORE, READ = "counted before", "read"
SOURCES = (FROM_INDEX, FROM_SIZES, FROM_STATS, FROM_PARQUET, BEFORE, READ)
"""Where counts come from, as `--dry-run` says it."""
DECLARED = (FROM_SIZES, FROM_STATS, FROM_PARQUET)
"""Those that nobody has checked against the shard."""
MOST = 2**40
"""Samples that a shard may be said to have."""


class CountedRecord(Record):
    """Samples of one format in a shard."""

    samples: Count
    bad: TallyRecord


class IndexedRecord(Record):
    """A shard in an index."""

    address: str
    """Its name in the index's folder; elsewhere its whole address."""
    size: Count
    version: str
    """What changes when the file is touched."""
    identity: str = Field(default="", pattern="^([0-9a-f]{32})?$")
    """Hash of its content; empty where only a version is known."""
    former: str = ""
    samples: dict[str, CountedRecord]
    """By digest of the format."""


class IndexRecord(Versioned):
    """An index of shards."""

    SCHEMA: ClassVar[int] = 1
    version: Version = Field(default=1, alias="schema")
    shards: list[IndexedRecord]


class Shared(NamedTuple):
    """The storage in which surveys look for an index."""

    storage: str
    keep: bool
    """Whether they leave there what they count."""


_SHARED: ContextVar[Shared | None] = ContextVar("shared", default=None)


@contextlib.contextmanager
def shared(storage: str, keep: bool) -> Iterator[None]:
    """Surveys inside look for indexes in `storage` too, and with `keep` leave there what they had to read."""
    token = _SHARED.set(Shared(storage, keep))
    try:
        yield
    finally:
        _SHARED.reset(token)


def folder_of(address: str) -> str:
    """The address of the folder that holds a file; of commands, which are in none, one that none has."""
    if is_command(address):
        return PIPE
    base, options = split_options(address)
    return (base.rpartition("/")[0] or ("/" if base.startswith("/") else ".")) + options


def base_name(address: str) -> str:
    """A file's name in its folder."""
    return (resolve(address)[1] if is_local(address) else split_options(address)[0]).rpartition("/")[2]


def whole_name(address: str) -> str:
    """A file's name in an index that lies elsewhere: without options, which say how it is reached, and secrets."""
    return resolve(address)[1] if is_local(address) else without_secrets(split_options(address)[0])


def kept_name(folder: str) -> str:
    """Where a storage keeps what was counted of the shards in a folder."""
    return f"{KEPT}/{short_hash(whole_name(folder))}.json"


def matches(entry: IndexedRecord, seen: Content) -> bool:
    """Whether a file is the one that an index means, by its size and version alone.

    A local file's version is `inode-size-changed-touched` (times in nanoseconds): a copy has another inode, and must
    have kept its time of change; in the same inode anything else than that means that it was touched.
    """
    if entry.size != seen.size or not entry.version:
        return False
    then, now = entry.version.split("-"), seen.version.split("-")
    if len(then) == len(now) == 4:
        return then == now or (then[0] != now[0] and then[2] == now[2])
    return entry.version == (seen.version or seen.identity)


def described(counts: Mapping[str, int]) -> str:
    """`120 shards from the index, 3 from sizes.json, 5 read`."""
    found = [(counts[source], source) for source in SOURCES if counts.get(source)]
    return ", ".join(f"{several(n, 'shard') if i == 0 else f'{n:,}'} {source}" for i, (n, source) in enumerate(found))


def load(folder: Folder, name: str = INDEX) -> dict[str, IndexedRecord]:
    """The shards of an index by their address in it; empty where there is none, or none that can be used, which is
    said. Raises OSError, and InputError where a newer raychain wrote it."""
    found = records.read(folder, name, IndexRecord)
    return {shard.address: shard for shard in found.shards} if found else {}


def save(folder: Folder, shards: dict[str, IndexedRecord], name: str = INDEX) -> None:
    """Writes an index. Raises OSError."""
    record = IndexRecord(shards=sorted(shards.values(), key=lambda shard: shard.address), version=IndexRecord.SCHEMA)
    records.write(folder, name, record)


def joined(entry: IndexedRecord | None, new: IndexedRecord) -> IndexedRecord:
    """`new` with the counts of other formats that `entry` has of the same content."""
    if entry is None or entry.size != new.size:
        return new
    if entry.version != new.version and not (entry.identity and entry.identity == new.identity):
        return new
    identity = new.identity or entry.identity
    return new.model_copy(update={"identity": identity, "samples": entry.samples | new.samples})


class Known:
    """What is known of shards before they are read. With `exact` that is what raychain itself counted alone."""

    def __init__(self, addresses: Sequence[str], *, exact: bool) -> None:
        self.exact, self.stale = exact, list[str]()
        """Shards that are not as an index has them."""
        self._shared = _SHARED.get()
        self._beside = {folder: _Beside(folder) for folder in dict.fromkeys(map(folder_of, addresses))}
        self._kept: dict[str, dict[str, IndexedRecord]] = {}
        self._stored: dict[str, IndexedRecord] = {}
        if self._shared and (storage := _folder(self._shared.storage)):
            self._stored = _patient_load(storage, INDEX)
            self._kept = {folder: _patient_load(storage, kept_name(folder)) for folder in self._beside}

    def entries(self, address: str) -> list[tuple[IndexedRecord, str]]:
        """What indexes say of a shard, and which kind of source each is."""
        folder, name = folder_of(address), whole_name(address)
        found = [
            (self._beside[folder].index.get(base_name(address)), FROM_INDEX),
            (self._stored.get(name), FROM_INDEX),
            (self._kept.get(folder, {}).get(name), BEFORE),
        ]
        return [(entry, source) for entry, source in found if entry]

    def say_stale(self, where: str) -> None:
        """Says which shards are not the ones of their index any more."""
        if self.stale:
            shown = ", ".join(sorted(self.stale)[:3]) + (", …" if len(self.stale) > 3 else "")
            log.warning(
                "%s shards of %s are not as their index has them (size, ETag or time stamps), so they are read again; "
                "raychain data index writes it anew: %s", f"{len(self.stale):,}", where, shown,
            )  # fmt: skip

    def declared(self, address: str, size: int) -> tuple[int, str] | None:
        """How many samples other files say that a shard of `size` bytes has, and which of them says so.

        Only where the shard lies on object storage: elsewhere it is read for its hash, and counted on the way.
        """
        if self.exact or is_local(address):
            return None
        return self._beside[folder_of(address)].declared(base_name(address), size)

    def keep(self, found: dict[str, IndexedRecord]) -> None:
        """Leaves what was counted (by address) in the storage, for the next job on any node."""
        if not (found and self._shared and self._shared.keep and (storage := _folder(self._shared.storage))):
            return
        for folder in {folder_of(address) for address in found}:
            own = {whole_name(a): entry for a, entry in found.items() if folder_of(a) == folder}
            kept = self._kept.get(folder, {})
            try:
                save(storage, kept | {n: joined(kept.get(n), entry) for n, entry in own.items()}, kept_name(folder))
            except OSError as error:
                log.warning("what was counted is not kept in %s: %s", storage.address, error)


class _Beside:
    """The files in the folder of shards that tell about them."""

    def __init__(self, address: str) -> None:
        self._folder, self._listed = _folder(address), not address.startswith(WEB)
        self.index = _patient_load(self._folder, INDEX) if self._folder else {}

    def declared(self, name: str, size: int) -> tuple[int, str] | None:
        if not self._folder:
            return None
        if name in self._sizes:
            return self._sizes[name], FROM_SIZES
        stem = name.removesuffix(".tar")
        try:
            if f"{stem}_stats.json" in self._names or not self._listed:
                told = self._folder.read_json(f"{stem}_stats.json")
                if found := _successes(told, size):
                    return found, FROM_STATS
                if self._listed or told is not None:
                    records.warn(f"{stem}_stats.json in {self._folder.address} names no number of samples")
            if f"{stem}.parquet" in self._names:
                if found := self._rows(self._folder, f"{stem}.parquet"):
                    return found, FROM_PARQUET
                records.warn(f"{stem}.parquet in {self._folder.address} has no rows of samples")
        except OSError as error:
            records.warn(f"what {self._folder.address} has beside {name} cannot be read: {error}")
        return None

    @cached_property
    def _names(self) -> frozenset[str]:
        """Files of the folder; none where it cannot be listed, as on the web."""
        if not self._folder or not self._listed:
            return frozenset()
        try:
            return frozenset(self._folder.list(""))
        except (OSError, NotImplementedError) as error:
            records.warn(f"{self._folder.address} cannot be listed: {error}")
            return frozenset()

    @cached_property
    def _sizes(self) -> dict[str, int]:
        if not self._folder or (self._listed and SIZES not in self._names):
            return {}
        try:
            content = self._folder.read(SIZES)
            found = records.document(content or b"") if content is not None or self._listed else {}
        except OSError as error:
            records.warn(f"{SIZES} in {self._folder.address} cannot be read: {error}")
            return {}
        if not isinstance(found, dict):
            records.warn(f"{SIZES} in {self._folder.address} is no JSON object, and not used")
            return {}
        counts = {name: _count(value) for name, value in found.items()}
        if wrong := [name for name, count in counts.items() if not count]:
            shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3:,} more" if len(wrong) > 3 else "")
            records.warn(f"{SIZES} in {self._folder.address} names no samples for {shown}, and is not used there")
        return {name: count for name, count in counts.items() if count}

    @staticmethod
    def _rows(folder: Folder, name: str) -> int:
        """Rows of img2dataset's table that became samples."""

        def count() -> int:
            try:
                with folder.fs.open_input_file(folder.join(name)) as source, pq.ParquetFile(source) as table:
                    if "status" not in table.schema_arrow.names:
                        return int(table.metadata.num_rows)
                    status = table.read(["status"]).column("status").cast(pa.string())
                    return int(pc.sum(pc.equal(status, "success")).as_py() or 0)
            except pa.ArrowException:  # what it holds: asking again does not mend it
                return 0

        return patiently(folder.address, count)


def _folder(address: str) -> Folder | None:
    """None for an address that no folder can have: what is wrong with it is said of the shards."""
    try:
        return Folder(address)
    except InputError:
        return None


def _patient_load(folder: Folder, name: str) -> dict[str, IndexedRecord]:
    """`load`, where a folder that cannot be read is one without an index."""
    try:
        return load(folder, name)
    except (OSError, NotImplementedError) as error:
        log.warning("%s in %s cannot be read: %s", name, folder.address, error)
        return {}


def _count(value: Any) -> int:
    """A number of samples, also as digits in quotes, which open_clip takes; 0 for what is none."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 13:
        value = int(value)
    return value if type(value) is int and 0 < value <= MOST else 0


def _successes(stats: Any, size: int) -> int:
    """What img2dataset, or `data build`, says of a shard; 0 where that is nothing, or is of a file of another size."""
    if not isinstance(stats, dict) or stats.get("bytes", size) != size:
        return 0
    return _count(stats.get("successes", stats.get("samples")))


def add_sizes(folder: Folder, sizes: dict[str, int]) -> None:
    """Writes open_clip's `sizes.json`: the number of samples by file name, beside what it has of other shards.

    Raises OSError.
    """
    found = records.document(folder.read(SIZES) or b"{}")
    if not isinstance(found, dict):
        log.warning("%s in %s was no JSON object; kept as %s", SIZES, folder.address, records.set_aside(folder, SIZES))
        found = {}
    folder.write(SIZES, (json.dumps(dict(sorted({**found, **sizes}.items())), indent=1) + "\n").encode())
