"""Tar members to samples, in img2dataset's and clip_benchmark's layouts, grouped as webdataset groups them."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from webdataset.tariterators import base_plus_ext

IMAGES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Wanted:
    """What a sample must hold besides a picture: captions (`txt`, `json.KEY`) or a class label (`cls`)."""

    captions: tuple[str, ...] = ()
    label: bool = False

    @property
    def digest(self) -> str:
        """Short hash of what is wanted."""
        return hashlib.blake2b(str((self.captions, self.label)).encode(), digest_size=6).hexdigest()

    @property
    def extensions(self) -> set[str]:
        """Member extensions that hold the captions."""
        return {key.partition(".")[0] for key in self.captions}

    def __str__(self) -> str:
        text = " or ".join(sorted(self.extensions)) if self.captions else "cls"
        return f"a picture ({', '.join(IMAGES)}) and {text}"


def samples(file: BinaryIO, wanted: Wanted, *, names_only: bool = False) -> Iterator[dict[str, Any]]:
    """Samples of an open tar file in order: {`key`, extension: bytes, …} (bytes are None with `names_only`).

    A sample is a run of members with one base name; it is usable if it has a picture and one of the wanted members.
    Raises tarfile.TarError and OSError for a damaged file.
    """
    current: dict[str, Any] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            key, extension = base_plus_ext(member.name) if member.isfile() else (None, None)
            if key is None or extension is None:
                continue
            if key != current.get("key"):
                if usable(current, wanted):
                    yield current
                current = {"key": key}
            extension = extension.lower()
            if names_only:
                current[extension] = None
            elif extension in IMAGES or extension in wanted.extensions or (wanted.label and extension == "cls"):
                handle = tar.extractfile(member)
                current[extension] = handle.read() if handle else b""
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"damaged member header at byte {tar.offset}")
        if usable(current, wanted):
            yield current


def usable(sample: dict[str, Any], wanted: Wanted) -> bool:
    """Whether the sample has a picture and a wanted member."""
    if not any(image in sample for image in IMAGES):
        return False
    return "cls" in sample if wanted.label else any(ext in sample for ext in wanted.extensions)


def picture(sample: dict[str, Any]) -> bytes:
    """The encoded picture."""
    return next(sample[image] for image in IMAGES if image in sample)


def captions(sample: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    """All captions of a sample in the order of `keys`, without empty ones and repetitions.

    Raises ValueError for text that is not UTF-8 or not JSON.
    """
    found: list[str] = []
    parsed: dict[str, Any] = {}
    for key in keys:
        extension, _, path = key.partition(".")
        if extension not in sample:
            continue
        if not path:
            found.append(sample[extension].decode())
            continue
        if extension not in parsed:
            parsed[extension] = json.loads(sample[extension])
        value: Any = parsed[extension]
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        values = value if isinstance(value, list) else [value]
        found += [v for v in values if isinstance(v, str)]
    return list(dict.fromkeys(text.strip() for text in found if text.strip()))
