"""Shards: from addresses to files with an identity and a count of usable samples."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from raychain import records
from raychain.core.json import Json
from raychain.core.storage import Folder, is_command, is_local
from raychain.data import commands, health
from raychain.data import shard as counting
from raychain.data.commands import unrun
from raychain.data.content import ChangedError, Content, identify, opened, say_tags_stand_in, short_hash
from raychain.data.health import Tally
from raychain.data.index import (
    BEFORE,
    READ,
    CountedRecord,
    IndexedRecord,
    Known,
    described,
    matches,
    whole_name,
)
from raychain.data.members import Format, Report, Sample
from raychain.data.shard import WHOLE_AHEAD, Shard, counted
from raychain.errors import InputError
from raychain.terminal.counting import CountingLine

log = logging.getLogger("raychain.data")
THREADS, ASKED = 16, 64
"""Shards that this machine reads, and those on object storage that it asks about, at once."""
SILENT_S = 3.0
"""How long shards are surveyed before a line counts them."""


def survey(
    addresses: Sequence[str], wanted: Format, cache: Path, where: str, *, exact: bool = False, hashed: bool = False
) -> list[Shard]:
    """Size, identity and count of usable samples of each shard; what an index or the like does not tell is read, in
    parallel, and kept in `cache`, and where `index.shared` says so.

    With `exact` no count is taken from others than raychain; with `hashed` the identities are hashes of the content on
    object storage too. What a shard cannot give (samples without a picture or caption, damage) is counted in
    `Shard.bad` and named in the log. Raises InputError for files that cannot be read or are being written, and if no
    shard has a usable sample.
    """
    shards = list(each_surveyed(addresses, wanted, cache, where, exact=exact, hashed=hashed))
    for shard in shards:
        health.name(shard.address, shard.bad)
    if not any(shard.samples for shard in shards):
        found = next((str(shard.bad) for shard in shards if shard.bad), "nothing of the kind is in them")
        raise InputError(
            where, f"{len(shards)} shards without a usable sample ({found})",
            f"complete tar files of samples with {wanted}", wanted.remedy,
        )  # fmt: skip
    if declared := Counter(shard.source for shard in shards if shard.declared):
        log.warning(
            "samples of %s: %s, and not by reading them; raychain data index does that once", where, described(declared)
        )
    return shards


def each_surveyed(
    addresses: Sequence[str], wanted: Format, cache: Path, where: str, *, exact: bool = False, hashed: bool = False
) -> Iterator[Shard]:
    """The shards of `survey` in their order, as they are known. Raises InputError."""
    began, known = time.monotonic(), _Known(addresses, exact=exact)
    read: dict[str, IndexedRecord] = {}

    def one(address: str) -> Shard:
        return _survey(address, wanted, cache, where, known, hashed)

    try:
        with ThreadPoolExecutor(known.width) as pool, CountingLine("shards identified and counted") as line:
            for done, shard in enumerate(pool.map(one, addresses), 1):
                if shard.source == READ:
                    read |= {shard.address: entry} if (entry := indexed(shard, wanted)) else {}
                if time.monotonic() - began > SILENT_S:
                    line.show(done, len(addresses))
                yield shard
    finally:
        if not hashed:  # else who asks writes the index anew
            known.say_stale(where)
        known.keep(read)


def indexed(shard: Shard, wanted: Format) -> IndexedRecord | None:
    """What an index says of a shard that was counted; None where nothing tells when it is touched."""
    if not (shard.version or not is_local(shard.address)):
        return None
    return IndexedRecord(
        address=whole_name(shard.address),
        size=shard.size,
        version=shard.version or shard.identity,
        identity=shard.identity if shard.version else "",
        former=shard.former,
        samples={wanted.digest: CountedRecord(samples=shard.samples, bad=shard.bad.record())},
    )


class _Known(Known):
    """What is known of shards, and what counts them."""

    def __init__(self, addresses: Sequence[str], *, exact: bool) -> None:
        super().__init__(addresses, exact=exact)
        self.elsewhere, self.commands = counting.elsewhere(), commands.allowed()
        self._remote = not all(map(is_local, addresses))
        self.here = threading.Semaphore(THREADS)
        """One place for each thread that counts on this machine."""
        self.counted: dict[str, Shard] = {}
        """Local shards that were counted where they were hashed."""

    @property
    def width(self) -> int:
        """Shards looked at at once."""
        return max(ASKED if self._remote else THREADS, self.elsewhere.width if self.elsewhere else 0)


def _survey(address: str, wanted: Format, cache: Path, where: str, known: _Known, hashed: bool) -> Shard:
    counts = Folder(str(cache / "counts"))
    try:
        if is_command(address):
            return _commanded(address, wanted, where, counts, known)
        return _identified(address, wanted, counts, known, hashed)
    except ChangedError as error:
        raise InputError(
            where, address, "a file that nothing writes to", f"start again when it is whole ({error})"
        ) from None
    except OSError as error:
        raise InputError(where, address, "a file that can be read", f"replace or remove the shard ({error})") from None


def _identified(address: str, wanted: Format, counts: Folder, known: _Known, hashed: bool) -> Shard:
    """The shard as indexes, notes and other files tell of it, else as it is read. Raises OSError."""
    entries = known.entries(address)
    content = identify(address, counts, lambda seen: _known_hash(address, seen, wanted, counts, known, hashed))
    shard = Shard(address, content.size, content.identity, 0, version=content.version, changed=content.changed)
    tagged = not is_local(address) and not content.version
    if tagged and (hashed or any(entry.identity for entry, _ in entries)):
        return _counted(shard, wanted, counts, known, hashed=True)
    for entry, source in entries:
        if matches(entry, content) or (entry.identity and entry.identity == shard.identity):
            shard = replace(shard, former=entry.former)
            if noted := entry.samples.get(wanted.digest):
                return replace(shard, samples=noted.samples, bad=Tally.of(noted.bad), source=source)
    if tagged:
        say_tags_stand_in()
    count = records.take(counts, _count_note(shard, wanted), records.CountRecord)
    if count is not None:
        return replace(shard, samples=count.samples, bad=Tally.of(count.bad), former=count.former, source=BEFORE)
    if not hashed and (told := known.declared(address, shard.size)):
        return replace(shard, samples=told[0], source=told[1])
    return _counted(shard, wanted, counts, known, hashed=False)


def _commanded(address: str, wanted: Format, where: str, counts: Folder, known: _Known) -> Shard:
    """The shard that a command prints, as it was noted when the command ran last; else it runs now. Raises OSError."""
    shard = Shard(address, 0, "", 0, version=short_hash(address))
    for entry, source in known.entries(address):
        if entry.version == shard.version and (noted := entry.samples.get(wanted.digest)):
            shard = replace(shard, size=entry.size, identity=entry.identity, former=entry.former, source=source)
            return replace(shard, samples=noted.samples, bad=Tally.of(noted.bad))
    note = counts.read_json(_hash_note(shard.version))
    if isinstance(note, dict) and isinstance(note.get("identity"), str) and isinstance(note.get("size"), int):
        shard = replace(shard, identity=note["identity"], size=note["size"], source=BEFORE)
        if count := records.take(counts, _count_note(shard, wanted), records.CountRecord):
            return replace(shard, samples=count.samples, bad=Tally.of(count.bad), former=count.former)
    if not known.commands:
        raise unrun(address, where)
    return _counted(shard, wanted, counts, known, hashed=False)


def _known_hash(address: str, seen: Content, wanted: Format, counts: Folder, known: _Known, hashed: bool) -> str:
    """The hash of a file that is not to be read for it, if an index has it; on object storage also a note of it."""
    entries = [entry for entry, _ in known.entries(address)]
    if found := next((entry.identity for entry in entries if entry.identity and matches(entry, seen)), ""):
        return found
    if entries and not any(matches(entry, seen) for entry in entries):
        known.stale.append(address)
    if not is_local(address) and (hashed or any(entry.identity for entry in entries)):
        noted = counts.read_json(_hash_note(seen.identity))
        if isinstance(noted, dict) and isinstance(noted.get("identity"), str):
            return noted["identity"]
    if is_local(address):
        file = Shard(address, seen.size, "", 0, version=seen.version)
        if (elsewhere := _asked(file, wanted, known, hashed=False)) is not None:
            known.counted[address] = elsewhere
            return elsewhere.identity
    return ""


def _hash_note(tag: str) -> str:
    """Name under which the hash of a file on object storage is kept."""
    return f"{tag}.hash.json"


def _counted(shard: Shard, wanted: Format, counts: Folder, known: _Known, *, hashed: bool) -> Shard:
    """The shard counted (`counted`), here or elsewhere, and noted. Raises OSError."""
    found = known.counted.pop(shard.address, None) or _asked(shard, wanted, known, hashed=hashed)
    if found is None:
        with known.here:
            found = counted(shard, wanted, hashed)
    notes: dict[str, Json] = {}
    if is_command(shard.address):
        notes[_hash_note(found.version)] = {"identity": found.identity, "size": found.size}
    elif hashed:
        notes[_hash_note(found.version)] = {"identity": found.identity}
    _note(found, wanted, counts, notes)
    return found


def _asked(shard: Shard, wanted: Format, known: _Known, *, hashed: bool) -> Shard | None:
    """The shard as it was counted on another machine; None where there is none that counts."""
    return known.elsewhere.count(shard, wanted, hashed) if known.elsewhere else None


def _count_note(shard: Shard, wanted: Format) -> str:
    """Name under which the count of a content is kept."""
    return f"{shard.identity}-{wanted.digest}.json"


def _note(shard: Shard, wanted: Format, counts: Folder, others: Mapping[str, Json]) -> None:
    """Keeps a count, and other notes by name."""
    record = records.CountRecord(samples=shard.samples, bad=shard.bad.record(), former=shard.former)
    try:
        for name, note in others.items():
            counts.write_json(name, note)
        records.write(counts, _count_note(shard, wanted), record)
    except OSError as error:
        raise InputError("preload.cache", counts.address, f"a folder that can be written ({error})",
                         "give another folder") from None  # fmt: skip


def read(shard: Shard, wanted: Format, report: Report = lambda _: None) -> Iterator[Sample]:
    """The usable samples of a shard in file order; `report` as for `Format.samples`.

    Raises OSError, naming the shard, where it cannot be read, and ChangedError, at the latest at its end, where it is
    no longer the one that was surveyed.
    """
    try:
        with opened(shard, WHOLE_AHEAD) as file:
            yield from wanted.samples(file, report)
    except ChangedError:
        raise
    except OSError as error:
        raise OSError(f"{shard.address}: {error}") from error
