"""The tasks that an address holds: clip_benchmark's folders by the files in them, other shards by being shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from raychain.core.storage import Folder, below
from raychain.data.addresses import is_pattern
from raychain.errors import InputError
from raychain.evaluators.data import (
    CLASSES,
    KIND,
    MULTILABEL,
    SPLIT,
    MultilabelData,
    RetrievalData,
    ZeroShotData,
    resolve_multilabel,
    resolve_retrieval,
    resolve_zero_shot,
)
from raychain.schema.captions import KeySplit

RETRIEVAL = "retrieval"
Task = ZeroShotData | MultilabelData | RetrievalData


def find_tasks(
    address: str, caption_keys: Sequence[str], cache_dir: str | Path, where: str, key_split: KeySplit = "first"
) -> list[Task]:
    """The tasks at an address, one or two.

    A folder with `classnames.txt` is a zero-shot task, with several labels a picture if its `dataset_type.txt` says
    `multilabel`; one whose `dataset_type.txt` says `retrieval` is a retrieval
    task on its `test/*.tar`, and so is a folder that has shards nowhere else. What is neither (a folder of shards, a
    shard, a pattern) is a retrieval task on those shards; `caption_keys` and `key_split` as in `data`.

    Raises InputError, naming `where`, for addresses without shards and for shards that do not fit the task.
    """
    found = _look(address, where)
    tasks: list[Task] = []
    if found.classes and found.kind == MULTILABEL:
        tasks.append(resolve_multilabel(address, cache_dir, where, key_split))
    elif found.classes:
        tasks.append(resolve_zero_shot(address, cache_dir, where, key_split))
    if found.kind == RETRIEVAL or not tasks:
        tasks.append(resolve_retrieval([found.shards], caption_keys, cache_dir, where, key_split))
    return tasks


def shards_of(address: str, where: str, split: str = SPLIT) -> str:
    """The address itself, or `split` below it where a folder is laid out as clip_benchmark does. Raises InputError."""
    return _look(address, where, split).shards


class _Found(NamedTuple):
    classes: bool
    """It has class names."""
    kind: str
    """What it says that it is for, or nothing."""
    shards: str


def _look(address: str, where: str, split: str = SPLIT) -> _Found:
    if is_pattern(address):
        return _Found(False, "", address)
    folder = Folder(address)
    try:
        names = folder.list() if not address.endswith(".tar") else []
        kind = (folder.read(KIND) or b"").decode(errors="replace").strip().lower() if KIND in names else ""
        below_it = split in names and any(name.endswith(".tar") for name in folder.list(split))
    except OSError as error:
        raise InputError(where, address, "a folder or shards that can be read", str(error)) from None
    inside = below_it and (kind == RETRIEVAL or not any(name.endswith(".tar") for name in names))
    return _Found(CLASSES in names, kind, below(address, split) if inside else address)
