"""Tar members to samples, in img2dataset's and clip_benchmark's layouts, grouped as webdataset groups them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from raychain.core.json import Json
from raychain.data.health import (
    DOTTED,
    DUPLICATE,
    EMPTY_PICTURE,
    HUGE,
    NO_CAPTION,
    NO_LABEL,
    NO_PICTURE,
    TEXT,
    TRUNCATED,
    Bad,
    Unusable,
)
from raychain.data.sentences import sentences
from raychain.data.tar import split_name, walk
from raychain.schema.captions import KeySplit, caption_key

IMAGES = ("jpg", "jpeg", "png", "webp")
LARGEST = 2**28
"""Bytes of a picture or a text; what is larger is not read."""
WAY_OUT = "data.key_split: last takes names up to their last dot"

Sample = dict[str, Any]
"""A sample of a tar file: its `key`, and the content of each member by extension."""
Report = Callable[[Bad], None]
"""Hears of what cannot be used."""


class Format(Protocol):
    """The members of a tar file that make a sample. Its `str` says it in words."""

    @property
    def digest(self) -> str:
        """Short hash of all that decides what is a sample; counts of samples are kept by it."""

    @property
    def remedy(self) -> str:
        """What a user can do where no shard holds a sample."""

    def samples(self, file: BinaryIO, report: Report, *, names_only: bool = False) -> Iterator[Sample]:
        """The usable samples of an open tar file in order; their members' content is None with `names_only`.

        `report` hears of what else is there and cannot be used. Raises OSError where the file cannot be read.
        """


@dataclass(frozen=True)
class Wanted:
    """A `Format`: pictures with captions (`data.captions.keys`), with a class (`cls`), with any number of classes
    (`npy`), or alone.
    """

    captions: tuple[str, ...] = ()
    label: bool = False
    key_split: KeySplit = "first"
    """`data.key_split`."""
    classes: bool = False
    """Any number of classes a picture: an array of a one for each class that it shows, and zeros."""
    below: int | None = None
    """Labels from 0 to below it are usable; None: all."""

    @property
    def digest(self) -> str:
        """Short hash of what is wanted."""
        how = (*(() if self.key_split == "first" else (self.key_split,)), *(("classes",) if self.classes else ()))
        how = (*how, *(() if self.below is None else (self.below,)))
        return hashlib.blake2b(str((self.captions, self.label, *how)).encode(), digest_size=6).hexdigest()

    @property
    def remedy(self) -> str:
        """What a user can do where no shard holds a sample."""
        return f"{'check data.captions.keys, or ' if self.captions else ''}replace the shards"

    def samples(self, file: BinaryIO, report: Report, *, names_only: bool = False) -> Iterator[Sample]:
        """See `samples` of this module."""
        return samples(file, self, names_only=names_only, report=report)

    @property
    def extensions(self) -> set[str]:
        """Member extensions that hold the captions, the label or the classes."""
        labels = {name for name, wanted in (("cls", self.label), ("npy", self.classes)) if wanted}
        return {caption_key(key).extension for key in self.captions} | labels

    def __str__(self) -> str:
        described = f" and {' or '.join(sorted(self.extensions))}" if self.extensions else ""
        return f"a picture ({', '.join(IMAGES)}){described}"


def samples(
    file: BinaryIO, wanted: Wanted, *, names_only: bool = False, report: Report = lambda _: None
) -> Iterator[Sample]:
    """Usable samples of an open tar file in order: {`key`, extension: bytes, …} (bytes are None with `names_only`).

    A sample is a run of members with one base name; it is usable if it has a picture and one of the wanted members.
    `report` hears, once each, of samples that have only one of the two or an empty picture, of names that come again
    (the first counts), of pictures that are lost because their names have a dot (at the end), and of what `walk`
    reports; a sample with a member cut short by the file's end, or too large to be read, is not used.
    Raises OSError where the file cannot be read.
    """
    current: Sample = {}
    skip = False
    seen: set[str] = set()
    last: Bad | None = None
    extensions, dotted = wanted.extensions, _Dotted(wanted)

    def bad(kind: str, key: str, detail: str = "") -> None:
        nonlocal last
        if last is None or last[:2] != (kind, key):  # the members of one sample are one
            last = Bad(kind, key, detail)
            report(last)

    for name, size, content in walk(file, bad, wanted.key_split):
        key, extension = split_name(name, wanted.key_split)
        extension = (extension or "").lower()
        if extension not in IMAGES and extension not in extensions and content:
            dotted.see(name, key)
            continue
        if key is None:
            continue
        if key != current.get("key"):
            if not skip and _usable(current, wanted, bad):
                yield current
            current, skip = {"key": key}, key in seen
            seen.add(key)
            if skip:
                bad(DUPLICATE, key)
        if skip:
            continue
        if extension in current:
            bad(DUPLICATE, key)
        elif content is None:
            skip = True
        elif size > LARGEST:
            skip = True
            bad(HUGE, key, f"{extension} of {size:,} bytes")
        elif extension in IMAGES and not size:
            skip = True
            bad(EMPTY_PICTURE, key)
        else:
            current[extension] = None if names_only else content()
            if extension in IMAGES:
                dotted.pictured.add(key)
    cut = last is not None and last.kind == TRUNCATED  # which is why the last sample lacks something
    if not skip and _usable(current, wanted, bad if not cut else lambda *_: None):
        yield current
    for key in dotted.lost():
        bad(DOTTED, key, WAY_OUT)


class _Dotted:
    """Pictures that the first-dot rule gives no picture's extension: `photo.v1.jpg` is the `v1.jpg` of `photo`.

    Such a picture is lost unless it is a further member of a sample with a picture, as `000.depth.png` of `000`.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.pictured: set[str] = set()
        """Keys of samples with a picture."""
        self._extensions = wanted.extensions if wanted.key_split == "first" else None
        self._pictures: dict[str, str | None] = {}
        self._described: set[str] = set()

    def see(self, name: str, key: str | None) -> None:
        """Takes a member that the rule does not use, and its key under the rule."""
        if self._extensions is None:
            return
        stem, extension = split_name(name, "last")
        extension = (extension or "").lower()
        if stem and extension in IMAGES:
            self._pictures.setdefault(stem, key)
        elif stem and extension in self._extensions:
            self._described.add(stem)

    def lost(self) -> list[str]:
        """Names, up to their last dot, of the pictures that are in no sample."""
        return [s for s, key in self._pictures.items() if key not in self.pictured or s in self._described]


def _usable(sample: Sample, wanted: Wanted, bad: Callable[[str, str], None]) -> bool:
    """Whether the sample has a picture and, if any are wanted, a wanted member; one with half of that is reported."""
    pictured = any(image in sample for image in IMAGES)
    if not wanted.extensions:
        return pictured
    described = any(extension in sample for extension in wanted.extensions)
    if pictured and not described:
        bad(NO_LABEL if wanted.label or wanted.classes else NO_CAPTION, sample["key"])
    elif described and not pictured:
        bad(NO_PICTURE, sample["key"])
    return pictured and described


def picture(sample: Sample) -> bytes:
    """The encoded picture."""
    found: bytes = next(sample[image] for image in IMAGES if image in sample)
    return found


class Annotation(NamedTuple):
    """What a sample says of its picture."""

    captions: list[str]
    label: int = -1
    classes: bytes = b""
    """A byte for each class: 1 if the picture shows it, 0 if not."""


def annotation(sample: Sample, wanted: Wanted) -> Annotation:
    """A sample's captions, at least one if any are wanted, and its label or classes if they are. Raises Unusable."""
    try:
        found = captions(sample, wanted.captions)
        "".join(found).encode()  # JSON can spell halves of characters, which no tokeniser takes
    except (ValueError, RecursionError) as error:
        raise Unusable(TEXT, str(error)) from None
    if wanted.captions and not found:
        raise Unusable(NO_CAPTION)
    try:
        if wanted.classes:
            return Annotation(found, classes=classes(sample["npy"]))
        label = int(sample["cls"]) if wanted.label else -1
        if wanted.below is not None and not 0 <= label < wanted.below:
            raise Unusable(NO_LABEL, f"label {label} of {wanted.below} classes, which are counted from 0")
        return Annotation(found, label)
    except ValueError as error:
        given = f"{sample['cls'][:20]!r} is no whole number" if wanted.label else str(error)
        raise Unusable(NO_LABEL, given) from None


def classes(content: bytes) -> bytes:
    """The classes of an `npy` member, as `Annotation` has them. Raises ValueError for anything but zeros and ones."""
    try:
        found = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        usable = found.ndim == 1 and len(found) and np.isin(found, (0, 1)).all()
    except Exception as error:  # for damaged arrays numpy raises nearly all
        raise ValueError(f"its npy is no array ({str(error)[:100]})") from None
    if not usable:
        raise ValueError("its npy is no row of zeros and ones")
    return found.astype(np.uint8).tobytes()


def captions(sample: Sample, keys: tuple[str, ...]) -> list[str]:
    """All captions of a sample in the order of `keys`, without empty ones and repetitions.

    Raises ValueError for text that is not UTF-8 or not JSON.
    """
    found: list[str] = []
    parsed: Json = {}
    for key in map(caption_key, keys):
        if key.extension not in sample:
            continue
        value: Any = sample[key.extension]
        if not key.path:
            value = value.decode()
        else:
            if key.extension not in parsed:
                parsed[key.extension] = json.loads(value)
            value = parsed[key.extension]
            for part in key.path:
                value = value.get(part) if isinstance(value, dict) else None
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if key.sentences or key.lines:
            texts = [part for text in texts for part in (sentences(text) if key.sentences else text.splitlines())]
        found += texts
    return list(dict.fromkeys(text.strip() for text in found if text.strip()))
