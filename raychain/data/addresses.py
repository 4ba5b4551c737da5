"""Addresses as people write them: braces, globs, folders, `::` between several, webdataset's `pipe:` commands."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from urllib.parse import quote, unquote

import braceexpand
from pyarrow import fs

from raychain.core.braces import count_alternatives
from raychain.core.storage import PIPE, TRANSFER_S, WEB, is_command, is_local, resolve, split_options
from raychain.data.commands import refused
from raychain.data.fetch import patiently
from raychain.errors import InputError

GLOB = "*?["
"""Characters that make a part of a path a pattern."""
SEPARATOR = "::"
"""Between several addresses in one."""
SHOWN = 300
"""Characters of an address in a message."""
MOST = 1_000_000
"""Shards that a pattern may name."""
MANY = 32
"""Files of a folder from which on it is listed, instead of asking about each."""
_ESCAPED = re.compile(r"\\.")
_ESCAPED_GLOB = re.compile("%(2a|3f|5b)", re.IGNORECASE)


def expand(patterns: Sequence[str], where: str, *, commands: bool = False) -> list[str]:
    """Absolute addresses of the shards that the patterns name (braces; globs, folders, files), in the order given.

    `::` stands between several patterns in one. A path that exists as it is written is that, whatever braces and
    brackets stand in it. As in a shell, globs do not match hidden files, and neither do folders hold them. Where there
    may be `commands`, `pipe:COMMAND` is the address of what it prints; it is not run. Raises InputError, naming
    `where`, for a pattern that matches nothing, and for what is no file, cannot be reached, or has a name that is not
    UTF-8.
    """
    found: list[str] = []
    for pattern in itertools.chain(*map(parted, patterns)):
        if is_command(pattern):
            if not commands or not pattern.removeprefix(PIPE).strip():
                raise refused(pattern, where)
            found += _alternatives(pattern, where)
            continue
        alternatives = _alternatives(pattern, where)
        listed = _listed(alternatives)
        with ThreadPoolExecutor(16) as pool:
            single = (address for address in alternatives if address not in listed)
            matches = pool.map(_match, single, repeat(pattern), repeat(where))
            for address in alternatives:
                found += [address] if address in listed else next(matches)
    return found


def _listed(addresses: Sequence[str]) -> set[str]:
    """Those of many files of object storage in one folder that are there, by a listing of the folder, which takes a
    thousandth of the requests. Where it cannot be had each is asked about."""
    if len(addresses) < MANY or is_local(addresses[0]) or addresses[0].startswith(WEB):
        return set()
    folders = {split_options(address)[0].rpartition("/")[0] for address in addresses}
    if len(folders) != 1 or any(c in split_options(address)[0] for address in addresses for c in GLOB + "%"):
        return set()
    base, options = split_options(addresses[0])
    folder = base.rpartition("/")[0]
    try:
        filesystem, path = resolve(folder + options)
        selector = fs.FileSelector(path, allow_not_found=True)
        found = patiently(folder, lambda: filesystem.get_file_info(selector), TRANSFER_S)
    except (OSError, NotImplementedError, InputError):
        return set()
    names = {info.base_name for info in found if info.type == fs.FileType.File}
    return {address for address in addresses if split_options(address)[0].rpartition("/")[2] in names}


def parted(address: str) -> list[str]:
    """The addresses between which `::` stands, as in open_clip; a path that exists as it is written is one."""
    if SEPARATOR not in address or (is_local(address) and os.path.lexists(os.path.expanduser(_local_path(address)))):  # noqa: PTH111
        return [address]
    return address.split(SEPARATOR)


def is_pattern(address: str) -> bool:
    """Whether an address has braces or globs; a path that exists as it is written is no pattern."""
    if parted(address) != [address]:
        return True
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
    if address.startswith(WEB):
        return _match_web(address, filesystem, path)
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


def _match_web(address: str, filesystem: fs.FileSystem, path: str) -> list[str]:
    """The address of a file on the web, where nothing is listed. Raises OSError."""
    if "*" in (name := split_options(address)[0]) or name.endswith("/"):
        raise OSError("web servers do not list their folders: name the shards by braces, as {00000..00331}.tar")
    if patiently(address, lambda: filesystem.get_file_info(path)).type != fs.FileType.File:
        raise FileNotFoundError(f"no such file: {address}")
    return [address]


def _fits(parts: list[str], wanted: list[str], first: int) -> bool:
    """Whether a path matches a pattern part by part from the part `first` on; `*` stands for no leading dot."""
    return len(parts) == len(wanted) and all(
        fnmatch.fnmatchcase(part, pattern) and (pattern.startswith(".") or not part.startswith("."))
        for part, pattern in zip(parts[first:], wanted[first:], strict=True)
    )
