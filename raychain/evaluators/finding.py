"""Which tasks an address holds: clip_benchmark's folders by the files in them, other shards by being shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raychain.config.experiment import KeySplit
from raychain.errors import InputError
from raychain.evaluators.data import CLASSES, SPLIT, RetrievalData, ZeroShotData, resolve_retrieval, resolve_zero_shot
from raychain.feed.shards import is_pattern
from raychain.storage import Folder, below

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
    if is_pattern(address):
        return [resolve_retrieval([address], caption_keys, cache_dir, where, key_split)]
    folder = Folder(address)
    try:
        names = folder.list() if not address.endswith(".tar") else []
        kind = (folder.read(KIND) or b"").decode(errors="replace").strip().lower() if KIND in names else ""
        split = any(name.endswith(".tar") for name in folder.list(SPLIT)) if SPLIT in names else False
    except OSError as error:
        raise InputError(where, address, "a folder or shards that can be read", str(error)) from None
    tasks: list[ZeroShotData | RetrievalData] = []
    if CLASSES in names:
        tasks.append(resolve_zero_shot(address, cache_dir, where, key_split))
    if kind == RETRIEVAL or not tasks:
        inside = split and (kind == RETRIEVAL or not any(name.endswith(".tar") for name in names))
        shards = below(address, SPLIT) if inside else address
        tasks.append(resolve_retrieval([shards], caption_keys, cache_dir, where, key_split))
    return tasks
