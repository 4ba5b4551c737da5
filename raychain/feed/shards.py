"""Shards: from addresses with braces and globs to files with an identity and a count of usable samples."""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import braceexpand
from pyarrow import fs

from raychain.errors import InputError
from raychain.feed import health, members
from raychain.feed.content import ChangedError, former_identity, identify, unchanged
from raychain.feed.fetch import open_input, patiently
from raychain.feed.health import Bad, Tally
from raychain.reporting.counting import CountingLine
from raychain.storage import Folder, resolve, split_options

WHOLE_AHEAD = 2**23
"""Bytes asked of object storage at once where the whole shard is read."""
SILENT_S = 3.0
"""How long shards are surveyed before a line counts them."""


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
    """As `Content.version`."""
    changed: float = field(default=math.inf, compare=False)
    """When the file was last touched, seconds since 1970."""
    former: str = field(default="", compare=False)
    """The identity that schema 2 gave it."""


def expand(patterns: Sequence[str], where: str) -> list[str]:
    """Absolute addresses of the shards that the patterns name (braces; globs, folders, files), in the order given.

    Raises InputError, naming `where`, for a pattern that matches nothing and for files that do not exist.
    """
    found: list[str] = []
    for pattern in patterns:
        try:
            addresses = list(braceexpand.braceexpand(pattern))
        except ValueError:
            raise InputError(where, pattern, "balanced braces such as {00000..00331}", "close the brace") from None
        with ThreadPoolExecutor(16) as pool:
            for matched in pool.map(_match, addresses, repeat(pattern), repeat(where)):
                found += matched
    return found


def _match(address: str, pattern: str, where: str) -> list[str]:
    filesystem, path = resolve(address)
    # s3://bucket/{…}.tar?endpoint_override=… : what stands around the path is put back around every match
    base, options = split_options(address)
    prefix = base.removesuffix(path) if "://" in base else ""
    try:
        info = patiently(address, lambda: filesystem.get_file_info(path))
        if info.type == fs.FileType.File:
            return [prefix + path + options]
        if info.type == fs.FileType.Directory:
            path = f"{path.rstrip('/')}/*.tar"
        elif not any(c in path for c in "*?["):
            raise InputError(where, pattern, "tar shards that exist", f"no such file: {address}")
        stem = path[: min(path.find(c) for c in "*?[" if c in path)].rpartition("/")[0]
        selector = fs.FileSelector(stem or "/", recursive="/" in path[len(stem) + 1 :], allow_not_found=True)
        found = patiently(address, lambda: filesystem.get_file_info(selector))
        names = [info.path for info in found if info.type == fs.FileType.File]
    except OSError as error:
        raise InputError(where, pattern, "shards that can be read", f"{address}: {error}") from None
    matched = sorted(n for n in names if fnmatch.fnmatchcase(n, path) and n.count("/") == path.count("/"))
    if not matched:
        raise InputError(where, pattern, "a pattern that matches at least one file", f"nothing matches {address}")
    return [prefix + name + options for name in matched]


def survey(addresses: Sequence[str], wanted: members.Wanted, cache: Path, where: str) -> list[Shard]:
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
            f"complete tar files of samples with {wanted}", "check data.captions.keys, or replace the shards",
        )  # fmt: skip
    return shards


def _survey(address: str, wanted: members.Wanted, cache: Path, where: str) -> Shard:
    counts = Folder(str(cache / "counts"))
    try:
        content = identify(address, counts)
        shard = Shard(address, content.size, content.identity, 0, version=content.version, changed=content.changed)
        name = f"{shard.identity}-{wanted.digest}.json"
        noted = counts.read_json(name)
        if isinstance(noted, dict) and {"samples", "bad", "former"} <= noted.keys():
            bad = Tally.from_dict(noted["bad"])
            return replace(shard, samples=noted["samples"], bad=bad, former=noted["former"])
        found: list[Bad] = []
        with unchanged(shard), open_input(address) as file:
            former = former_identity(file, shard.size)
            file.seek(0)
            samples = sum(1 for _ in members.samples(file, wanted, names_only=True, report=found.append))
    except ChangedError as error:
        raise InputError(
            where, address, "a file that nothing writes to", f"start again when it is whole ({error})"
        ) from None
    except OSError as error:
        raise InputError(where, address, "a file that can be read", f"replace or remove the shard ({error})") from None
    bad = health.tally(found)
    try:
        counts.write_json(name, {"samples": samples, "bad": bad.as_dict(), "former": former})
    except OSError as error:
        raise InputError("preload.cache", counts.address, f"a folder that can be written ({error})",
                         "give another folder") from None  # fmt: skip
    return replace(shard, samples=samples, bad=bad, former=former)


def read(
    shard: Shard, wanted: members.Wanted, report: Callable[[Bad], None] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """The usable samples of a shard in file order; `report` as for `members.samples`.

    Raises OSError, naming the shard, where it cannot be read, and ChangedError, at the latest at its end, where it is
    no longer the one that was surveyed.
    """
    try:
        with unchanged(shard), open_input(shard.address, WHOLE_AHEAD) as file:
            yield from members.samples(file, wanted, report=report)
    except ChangedError:
        raise
    except OSError as error:
        raise OSError(f"{shard.address}: {error}") from error
