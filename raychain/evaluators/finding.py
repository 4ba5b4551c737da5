"""The tasks that an address holds: clip_benchmark's folders by the files in them, other shards by being shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from raychain.core.storage import Folder, below
from raychain.data.shards import is_pattern
from raychain.errors import InputError
from raychain.evaluators.data import CLASSES, SPLIT, RetrievalData, ZeroShotData, resolve_retrieval, resolve_zero_shot
from raychain.schema.captions import KeySplit

KIND, RETRIEVAL = "dataset_type.txt", "retrieval"


def find_tasks(
    address: str, caption_keys: Sequence[str], cache_dir: str | Path, where: str, key_split: KeySplit = "first"
) -> list[ZeroShotData | RetrievalData]:
    """The tasks at an address, one or two.

    A folder with `classnames.txt` is a zero-shot task; one whose `dataset_type.txt` says `retrieval` is a retrieval
    task on its `test/*.tar`, and so is a folder that has shards nowhere else. What is neither (a folder of shards, a
    shard, a pattern) is a retrieval task on those shards; `caption_keys` and `key_split` as in `data`.

    Raises InputError, naming `where`, for addresses without shards and for shards that do not fit the task.
    """
    found = _look(address, where)
    tasks: list[ZeroShotData | RetrievalData] = []
    if found.classes:
        tasks.append(resolve_zero_shot(address, cache_dir, where, key_split))
    if found.retrieval or not tasks:
        tasks.append(resolve_retrieval([found.shards], caption_keys, cache_dir, where, key_split))
    return tasks


def shards_of(address: str, where: str, split: str = SPLIT) -> str:
    """The address itself, or `split` below it where a folder is laid out as clip_benchmark does. Raises InputError."""
    return _look(address, where, split).shards


class _Found(NamedTuple):
    classes: bool
    """It has class names."""
    retrieval: bool
    """It says that it is a retrieval task."""
    shards: str


def _look(address: str, where: str, split: str = SPLIT) -> _Found:
    if is_pattern(address):
        return _Found(False, False, address)
    folder = Folder(address)
    try:
        names = folder.list() if not address.endswith(".tar") else []
        kind = (folder.read(KIND) or b"").decode(errors="replace").strip().lower() if KIND in names else ""
        below_it = split in names and any(name.endswith(".tar") for name in folder.list(split))
    except OSError as error:
        raise InputError(where, address, "a folder or shards that can be read", str(error)) from None
    inside = below_it and (kind == RETRIEVAL or not any(name.endswith(".tar") for name in names))
    return _Found(CLASSES in names, kind == RETRIEVAL, below(address, split) if inside else address)
