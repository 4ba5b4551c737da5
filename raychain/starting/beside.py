"""Held-out data beside training shards, found by the folders' names."""

from __future__ import annotations

from typing import NamedTuple

from raychain.core.storage import Folder
from raychain.data.addresses import is_pattern
from raychain.errors import InputError
from raychain.evaluators.data import CLASSES

HELD_OUT = ("val", "test", "validation", "held-out")
CLASSIFIED = ("zero_shot/test", "zero_shot", "imagenet")


class Beside(NamedTuple):
    """Addresses of held-out data; None where there is none."""

    zero_shot: str | None = None
    retrieval: str | None = None


def beside(address: str) -> Beside:
    """Held-out data in the folder that holds the folder of the training shards."""
    parent = _above(_folder(address))
    if is_pattern(parent):
        return Beside()
    zero_shot = next((found for name in CLASSIFIED if _holds(found := f"{parent}/{name}", CLASSES)), None)
    retrieval = next((found for name in HELD_OUT if _holds(found := f"{parent}/{name}", ".tar")), None)
    return Beside(zero_shot, retrieval)


def class_names(address: str) -> int:
    """Lines of the `classnames.txt` beside training shards or in the folder above; 0 where there is none."""
    folder = _folder(address)
    for place in (folder, _above(folder)):
        try:
            content = Folder(place).read(CLASSES)
        except (OSError, InputError):
            continue
        if content is not None:
            return len(content.decode(errors="replace").strip().splitlines())
    return 0


def _folder(address: str) -> str:
    return _above(address) if is_pattern(address) or address.endswith(".tar") else address.rstrip("/")


def _above(address: str) -> str:
    return address.rpartition("/")[0] or "."


def held_out(address: str) -> str | None:
    """Held-out shards beside the folder of the training shards."""
    return beside(address).retrieval


def _holds(address: str, ending: str) -> bool:
    try:
        return any(name.endswith(ending) for name in Folder(address).list())
    except (OSError, InputError):
        return False
