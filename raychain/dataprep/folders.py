"""Class folders, as torchvision's ImageFolder reads them, into shards of labelled pictures.

The result is laid out as clip_benchmark's data sets are, which `evaluate` takes as it is: `classnames.txt`, a name a
line in the order of the labels, `train/*.tar` and, where pictures are held out, `test/*.tar`. Pictures are mixed over
the shards by hashes of their paths, so the same folder gives the same shards everywhere.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from raychain.core.json import Json
from raychain.core.storage import Folder
from raychain.data.members import Wanted
from raychain.dataprep.build import Options, build
from raychain.dataprep.table import Entry
from raychain.errors import InputError

WHERE = "TABLE"
CLASSNAMES, TRAIN, TEST = "classnames.txt", "train", "test"
SPLITS = {"train": TRAIN, "val": TEST, "valid": TEST, "validation": TEST, "test": TEST}
"""Folders that are no classes but parts of a data set, where there is one called train."""
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class LabelledPictures:
    """One part of a data set: paths in `folder` with their labels, in the order of the shards."""

    folder: str
    pictures: tuple[tuple[str, int], ...]
    wanted: Wanted = Wanted(label=True)  # noqa: RUF009 - frozen

    def entries(self) -> Iterator[Entry]:
        """All pictures in order."""
        return (Entry(path, (), label=label) for path, label in self.pictures)


@dataclass(frozen=True)
class ClassFolders:
    """A data set in class folders."""

    classes: tuple[str, ...]
    parts: Mapping[str, LabelledPictures]
    """`train`, and `test` where pictures are held out."""


def open_folders(address: str, held_out: float = 0.0) -> ClassFolders:
    """The data set in a folder with a folder for each class, or with such in `train` and `val` or `test`.

    `held_out` is the share of each class's pictures that becomes the test set, one at least. Raises InputError for
    folders without classes or pictures, and for test pictures of classes that training does not have.
    """
    root = Path(address).expanduser()
    inside = _folders(root)
    own = {name: SPLITS[name.lower()] for name in inside if name.lower() in SPLITS}
    if TRAIN not in own.values():
        found = _listed(root, inside, address)
        parts = {TRAIN: found}
        if held_out:
            parts = _divided(found, held_out, address)
        return ClassFolders(tuple(inside), parts)
    if held_out:
        raise InputError("--test", held_out, f"no share where the folder has its own test set ({', '.join(own)})",
                         "leave --test out") if TEST in own.values() else InputError(
            "--test", held_out, f"a folder of classes, not of {TRAIN}", f"give {address}/{TRAIN}")  # fmt: skip
    if sorted(own) != sorted(inside) or len(set(own.values())) != len(own):
        raise InputError(WHERE, f"{address} with {', '.join(inside[:8])}", "folders of classes, or train with one of "
                         "val and test", "give the folder of the classes")  # fmt: skip
    classes: list[str] = []
    parts = {}
    for name, part in sorted(own.items(), key=lambda item: item[1] == TEST):
        names = _folders(root / name)
        if part == TRAIN:
            classes = names
        elif unknown := [n for n in names if n not in classes]:
            raise InputError(WHERE, f"{address}/{name}/{unknown[0]}", f"classes that {TRAIN} has", "correct the folder")
        parts[part] = _listed(root / name, classes, f"{address}/{name}")
    return ClassFolders(tuple(classes), parts)


def build_folders(
    found: ClassFolders, out: str, options: Options, on_progress: Callable[[int, int, int], None] = lambda *_: None
) -> Json:
    """Packs the data set into the folder `out`: {`folder`, `classes`, and what `build` returns for each part}.

    Shards that an earlier call finished are kept. `on_progress` hears (pictures done, pictures, failures).
    Raises InputError and OSError as `build` does.
    """
    folder = Folder(out)
    allowed = {CLASSNAMES, TRAIN, TEST}
    path = Path(out).expanduser()
    if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - allowed):
        raise InputError("--out", out, "a new or empty folder, or one of an earlier data build", "give another folder")
    names = "".join(f"{name}\n" for name in found.classes).encode()
    if (known := folder.read(CLASSNAMES)) is not None and known != names:
        raise InputError("--out", f"{out}, built with other classes", "the same folder of classes, to continue",
                         "give another folder, or remove this one")  # fmt: skip
    folder.write(CLASSNAMES, names)
    total = sum(len(part.pictures) for part in found.parts.values())
    results: Json = {"folder": folder.path, "classes": len(found.classes), "parts": {}}
    before = failed = 0
    for name, part in found.parts.items():

        def tell(done: int, _: int, bad: int, before: int = before, failed: int = failed) -> None:
            on_progress(before + done, total, failed + bad)

        packed = build(part, folder.join(name), options, tell)
        before, failed = before + packed["rows"], failed + sum(packed["failed"].values())
        results["parts"][name] = packed
    return results


def _folders(root: Path) -> list[str]:
    """Names of the folders in a folder, sorted."""
    try:
        return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise InputError(WHERE, root, "a folder that can be read", str(error)) from None


def _listed(root: Path, classes: Sequence[str], address: str) -> LabelledPictures:
    """All pictures below the classes' folders, mixed."""
    if len(classes) < 2:
        raise InputError(WHERE, address, "a table, or a folder with a folder of pictures for each class",
                         "give such a folder")  # fmt: skip
    if odd := [name for name in classes if "\n" in name]:
        raise InputError(WHERE, repr(odd[0]), "folders' names in one line", "rename it")
    found: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        for folder, _, files in os.walk(root / name, followlinks=True):
            inside = Path(folder).relative_to(root)
            found += [((inside / file).as_posix(), label) for file in files if _is_picture(file)]
    if not found:
        raise InputError(
            WHERE, address, f"pictures ({', '.join(PICTURES)}) in the classes' folders", "check the folder"
        )
    return LabelledPictures(str(root.resolve()), tuple(sorted(found, key=lambda picture: _hash(picture[0]))))


def _is_picture(file: str) -> bool:
    return file.lower().endswith(PICTURES) and not file.startswith(".")


def _divided(found: LabelledPictures, share: float, address: str) -> dict[str, LabelledPictures]:
    """The same share of each class held out."""
    of: dict[int, list[tuple[str, int]]] = {}
    for picture in sorted(found.pictures, key=lambda picture: _hash(f"test/{picture[0]}")):
        of.setdefault(picture[1], []).append(picture)
    held = {picture for pictures in of.values() for picture in pictures[: max(1, round(share * len(pictures)))]}
    parts = {TRAIN: tuple(p for p in found.pictures if p not in held),
             TEST: tuple(p for p in found.pictures if p in held)}  # fmt: skip
    if {label for _, label in parts[TRAIN]} != set(of):
        raise InputError("--test", share, f"a share that leaves every class of {address} a picture to train on",
                         "lower it, or remove classes of one picture")  # fmt: skip
    return {name: replace(found, pictures=pictures) for name, pictures in parts.items()}


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
