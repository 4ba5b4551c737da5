"""Shards: from addresses with braces and globs to files with an identity and a count of usable samples."""

from __future__ import annotations

import fnmatch
import glob
import io
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from urllib.parse import quote, unquote

import braceexpand
from pyarrow import fs

from raychain import records
from raychain.core.braces import count_alternatives
from raychain.core.storage import TRANSFER_S, Folder, is_local, resolve, split_options
from raychain.data import health
from raychain.data.content import (
    ChangedError,
    Content,
    Hashed,
    former_identity,
    identify,
    say_tags_stand_in,
    unchanged,
)
from raychain.data.fetch import open_input, patiently
from raychain.data.health import Bad, Tally
from raychain.data.index import (
    BEFORE,
    DECLARED,
    READ,
    CountedRecord,
    IndexedRecord,
    Known,
    described,
    matches,
    whole_name,
)
from raychain.data.members import Format, Report, Sample
from raychain.errors import InputError
from raychain.terminal.counting import CountingLine

log = logging.getLogger("raychain.data")
WHOLE_AHEAD = 2**23
"""Bytes asked of object storage at once where the whole shard is read."""
SILENT_S = 3.0
"""How long shards are surveyed before a line counts them."""
GLOB = "*?["
"""Characters that make a part of a path a pattern."""
SHOWN = 300
"""Characters of an address in a message."""
MOST = 1_000_000
"""Shards that a pattern may name."""
_ESCAPED = re.compile(r"\\.")
_ESCAPED_GLOB = re.compile("%(2a|3f|5b)", re.IGNORECASE)


@dataclass(frozen=True)
class Shard:
    """One tar file, as it was when it was surveyed."""

    address: str
    size: int
    identity: str
    """Tells its content, so a copy that was moved is the same shard and a changed byte makes another."""
    samples: int
    bad: Tally = field(default_factory=Tally, compare=False)
    """What is not among `samples`, as far as the members' names tell."""
    version: str = field(default="", compare=False)
    """The version, as in `Content.version`."""
    changed: float = field(default=math.inf, compare=False)
    """When the file was last touched, seconds since 1970."""
    former: str = field(default="", compare=False)
    """The identity that schema 2 gave it; empty where it was not read."""
    source: str = field(default=READ, compare=False)
    """Where the count comes from, one of `index.SOURCES`."""

    @property
    def declared(self) -> bool:
        """Whether nobody has counted: the count is what a file beside the shard says, and may be wrong."""
        return self.source in DECLARED


def expand(patterns: Sequence[str], where: str) -> list[str]:
    """Absolute addresses of the shards that the patterns name (braces; globs, folders, files), in the order given.

    A path that exists as it is written is that, whatever braces and brackets stand in it. As in a shell, globs do not
    match hidden files, and neither do folders hold them. Raises InputError, naming `where`, for a pattern that matches
    nothing, and for what is no file, cannot be reached, or has a name that is not UTF-8.
    """
    found: list[str] = []
    for pattern in patterns:
        with ThreadPoolExecutor(16) as pool:
            for matched in pool.map(_match, _alternatives(pattern, where), repeat(pattern), repeat(where)):
                found += matched
    return found


def is_pattern(address: str) -> bool:
    """Whether an address has braces or globs; a path that exists as it is written is no pattern."""
    if is_local(address):
        return bool(_known(_local_path(address), GLOB + "{")[1])
    return any(c in split_options(address)[0] for c in GLOB + "{")


def _alternatives(pattern: str, where: str) -> list[str]:
    """The pattern with its braces expanded, but for those of folders and files that exist as they are written."""
    known, rest = _known(_local_path(pattern), "{") if is_local(pattern) else ("", pattern)
    try:
        if pattern and count_alternatives(_ESCAPED.sub("", rest)) <= MOST:
            found = [known + alternative for alternative in braceexpand.braceexpand(rest)] if rest else [known]
            return [f"file://{quote(path)}" for path in found] if pattern.startswith("file://") else found
    except (ValueError, RecursionError):
        shown = pattern[:SHOWN]
        raise InputError(where, shown, "balanced braces such as {00000..00331}", "close the brace") from None
    raise InputError(where, pattern[:SHOWN], f"the address of 1 … {MOST:,} shards", "correct it, or give a folder")


def _match(address: str, pattern: str, where: str) -> list[str]:
    try:
        names = _match_local(address) if is_local(address) else _match_remote(address)
    except (OSError, ValueError) as error:
        fix = f"correct the path, or what is there ({str(error)[:SHOWN]})"
        raise InputError(where, pattern[:SHOWN], "tar shards that exist and can be read", fix) from None
    if not names:
        allowed = "a pattern that matches at least one file, or a folder with .tar files"
        raise InputError(where, pattern[:SHOWN], allowed, f"nothing matches {address[:SHOWN]}")
    return names


def _local_path(address: str) -> str:
    return unquote(address.removeprefix("file://")) if "://" in address else address


def _known(path: str, special: str) -> tuple[str, str]:
    """A local path in two: its leading parts without a `special` character or that exist as they are, and the rest."""
    parts = path.split("/")
    for i, part in enumerate(parts):
        head = os.path.expanduser("/".join(parts[: i + 1]))  # noqa: PTH111
        if any(c in part for c in special) and not os.path.lexists(head):
            known = "/".join(parts[:i]) + ("/" if i else "")
            return known, path[len(known) :]
    return path, ""


def _match_local(address: str) -> list[str]:
    """Addresses of the shards that a path or glob of this machine names, sorted.

    Raises OSError, and ValueError for characters that no path can have.
    """
    path = str(Path(os.path.expanduser(_local_path(address))).absolute())  # noqa: PTH111 - `./~a` is no home
    known, rest = _known(path, GLOB)
    if rest:
        names = glob.glob(glob.escape(known) + rest)  # noqa: PTH207 - pathlib's takes hidden files
    elif Path(path).is_dir():
        names = [str(p) for p in Path(path).iterdir() if p.name.endswith(".tar") and not p.name.startswith(".")]
    else:
        names = [path]
    found = sorted(name for name in names if not Path(name).is_dir())
    for name in found:
        shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if shown.encode() != os.fsencode(name):
            raise OSError(f"{shown} has a name that is not UTF-8")
        if not Path(name).is_file():
            missing = "a link to a file that is not there" if Path(name).is_symlink() else "no regular file"
            raise OSError(f"{name} is {missing}" if os.path.lexists(name) else f"no such file: {name}")
    return [f"file://{quote(name)}" for name in found] if "://" in address else found


def _match_remote(address: str) -> list[str]:
    """Addresses of the shards that an address or glob of another filesystem names, sorted. Raises OSError."""
    filesystem, path = resolve(address)
    # s3://bucket/{…}.tar?endpoint_override=… : what stands around the path is put back around every match
    base, options = split_options(address)
    escapes = not isinstance(filesystem, fs.PyFileSystem)  # pyarrow's own take addresses with %20, fsspec's as they are
    parts = path.rstrip("/").split("/")
    written = base.rstrip("/").split("/")[-len(parts) :]
    head = base.rstrip("/").removesuffix("/".join(written)) + written[0].removesuffix(parts[0])

    def back(name: str) -> str:
        return head + (quote(name) if escapes else name) + options

    info = patiently(address, lambda: filesystem.get_file_info(path))
    if info.type == fs.FileType.File:
        return [back(path)]
    first = next((i for i, part in enumerate(written) if any(c in part for c in GLOB)), len(parts))
    wanted = [*parts[:first]]
    for part in written[first:]:
        wanted.append(unquote(_ESCAPED_GLOB.sub(r"[%\1]", part)) if escapes else part)
    if info.type == fs.FileType.Directory:
        first, wanted = len(parts), [*parts, "*.tar"]
    elif first == len(parts):
        raise FileNotFoundError(f"no such file: {address}")
    selector = fs.FileSelector("/".join(parts[:first]) or "/", recursive=len(wanted) > first + 1, allow_not_found=True)
    found = patiently(address, lambda: filesystem.get_file_info(selector), TRANSFER_S)
    names = [info.path for info in found if info.type == fs.FileType.File]
    return [back(name) for name in sorted(names) if _fits(name.split("/"), wanted, first)]


def _fits(parts: list[str], wanted: list[str], first: int) -> bool:
    """Whether a path matches a pattern part by part from the part `first` on; `*` stands for no leading dot."""
    return len(parts) == len(wanted) and all(
        fnmatch.fnmatchcase(part, pattern) and (pattern.startswith(".") or not part.startswith("."))
        for part, pattern in zip(parts[first:], wanted[first:], strict=True)
    )


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
    began, known = time.monotonic(), Known(addresses, exact=exact)
    read: dict[str, IndexedRecord] = {}

    def one(address: str) -> Shard:
        return _survey(address, wanted, cache, where, known, hashed)

    try:
        with ThreadPoolExecutor(16) as pool, CountingLine("shards identified and counted") as line:
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


def _survey(address: str, wanted: Format, cache: Path, where: str, known: Known, hashed: bool) -> Shard:
    counts = Folder(str(cache / "counts"))
    try:
        return _identified(address, wanted, counts, known, hashed)
    except ChangedError as error:
        raise InputError(
            where, address, "a file that nothing writes to", f"start again when it is whole ({error})"
        ) from None
    except OSError as error:
        raise InputError(where, address, "a file that can be read", f"replace or remove the shard ({error})") from None


def _identified(address: str, wanted: Format, counts: Folder, known: Known, hashed: bool) -> Shard:
    """The shard as indexes, notes and other files tell of it, else as it is read. Raises OSError."""
    entries = known.entries(address)
    content = identify(address, counts, lambda seen: _known_hash(address, seen, counts, known, hashed))
    shard = Shard(address, content.size, content.identity, 0, version=content.version, changed=content.changed)
    tagged = not is_local(address) and not content.version
    if tagged and (hashed or any(entry.identity for entry, _ in entries)):
        return _read(shard, wanted, counts, hashed=True)
    for entry, source in entries:
        if matches(entry, content) or (entry.identity and entry.identity == shard.identity):
            shard = replace(shard, former=entry.former)
            if noted := entry.samples.get(wanted.digest):
                return replace(shard, samples=noted.samples, bad=Tally.of(noted.bad), source=source)
    if tagged:
        say_tags_stand_in()
    count = records.take(counts, f"{shard.identity}-{wanted.digest}.json", records.CountRecord)
    if count is not None:
        return replace(shard, samples=count.samples, bad=Tally.of(count.bad), former=count.former, source=BEFORE)
    if not hashed and (told := known.declared(address, shard.size)):
        return replace(shard, samples=told[0], source=told[1])
    return _read(shard, wanted, counts, hashed=False)


def _known_hash(address: str, seen: Content, counts: Folder, known: Known, hashed: bool) -> str:
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
    return ""


def _hash_note(tag: str) -> str:
    """Name under which the hash of a file on object storage is kept."""
    return f"{tag}.hash.json"


def _read(shard: Shard, wanted: Format, counts: Folder, *, hashed: bool) -> Shard:
    """The shard counted, and with `hashed` identified by a hash of the content that is read. Raises OSError."""
    found: list[Bad] = []
    with unchanged(shard), open_input(shard.address, *((WHOLE_AHEAD,) if hashed else ())) as file:
        if hashed:
            passed = Hashed(file, shard.size)
            samples = sum(1 for _ in wanted.samples(io.BufferedReader(passed), found.append, names_only=True))
            tag, identity = shard.identity, passed.hexdigest()
            former = former_identity(file, shard.size)
        else:
            former = former_identity(file, shard.size)
            file.seek(0)
            samples = sum(1 for _ in wanted.samples(file, found.append, names_only=True))
    bad = health.tally(found)
    try:
        if hashed:
            shard = replace(shard, identity=identity, version=tag)
            counts.write_json(_hash_note(tag), {"identity": identity})
        name = f"{shard.identity}-{wanted.digest}.json"
        records.write(counts, name, records.CountRecord(samples=samples, bad=bad.record(), former=former))
    except OSError as error:
        raise InputError("preload.cache", counts.address, f"a folder that can be written ({error})",
                         "give another folder") from None  # fmt: skip
    return replace(shard, samples=samples, bad=bad, former=former, source=READ)


def read(shard: Shard, wanted: Format, report: Report = lambda _: None) -> Iterator[Sample]:
    """The usable samples of a shard in file order; `report` as for `Format.samples`.

    Raises OSError, naming the shard, where it cannot be read, and ChangedError, at the latest at its end, where it is
    no longer the one that was surveyed.
    """
    try:
        with unchanged(shard), open_input(shard.address, WHOLE_AHEAD) as file:
            yield from wanted.samples(file, report)
    except ChangedError:
        raise
    except OSError as error:
        raise OSError(f"{shard.address}: {error}") from error
