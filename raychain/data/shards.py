"""Shards: from addresses with braces and globs to files with an identity and a count of usable samples."""

from __future__ import annotations

import fnmatch
import glob
import math
import os
import re
import time
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
from raychain.data.content import ChangedError, former_identity, identify, unchanged
from raychain.data.fetch import open_input, patiently
from raychain.data.health import Bad, Tally
from raychain.data.members import Format, Report, Sample
from raychain.errors import InputError
from raychain.terminal.counting import CountingLine

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
    """The identity that schema 2 gave it."""


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


def survey(addresses: Sequence[str], wanted: Format, cache: Path, where: str) -> list[Shard]:
    """Size, identity and count of usable samples of each shard, read in parallel; both are kept in `cache`.

    What a shard cannot give (samples without a picture or caption, damage) is counted in `Shard.bad` and named in the
    log. Raises InputError for files that cannot be read or are being written, and if no shard has a usable sample.
    """
    began, shards = time.monotonic(), []
    with ThreadPoolExecutor(16) as pool, CountingLine("shards identified and counted") as line:
        for shard in pool.map(lambda address: _survey(address, wanted, cache, where), addresses):
            shards.append(shard)
            if time.monotonic() - began > SILENT_S:
                line.show(len(shards), len(addresses))
    for shard in shards:
        health.name(shard.address, shard.bad)
    if not any(shard.samples for shard in shards):
        found = next((str(shard.bad) for shard in shards if shard.bad), "nothing of the kind is in them")
        raise InputError(
            where, f"{len(shards)} shards without a usable sample ({found})",
            f"complete tar files of samples with {wanted}", wanted.remedy,
        )  # fmt: skip
    return shards


def _survey(address: str, wanted: Format, cache: Path, where: str) -> Shard:
    counts = Folder(str(cache / "counts"))
    try:
        content = identify(address, counts)
        shard = Shard(address, content.size, content.identity, 0, version=content.version, changed=content.changed)
        name = f"{shard.identity}-{wanted.digest}.json"
        noted = records.take(counts, name, records.CountRecord)
        if noted is not None:
            return replace(shard, samples=noted.samples, bad=Tally.of(noted.bad), former=noted.former)
        found: list[Bad] = []
        with unchanged(shard), open_input(address) as file:
            former = former_identity(file, shard.size)
            file.seek(0)
            samples = sum(1 for _ in wanted.samples(file, found.append, names_only=True))
    except ChangedError as error:
        raise InputError(
            where, address, "a file that nothing writes to", f"start again when it is whole ({error})"
        ) from None
    except OSError as error:
        raise InputError(where, address, "a file that can be read", f"replace or remove the shard ({error})") from None
    bad = health.tally(found)
    try:
        records.write(counts, name, records.CountRecord(samples=samples, bad=bad.record(), former=former))
    except OSError as error:
        raise InputError("preload.cache", counts.address, f"a folder that can be written ({error})",
                         "give another folder") from None  # fmt: skip
    return replace(shard, samples=samples, bad=bad, former=former)


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
