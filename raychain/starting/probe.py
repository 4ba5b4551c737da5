"""What shards hold, as their first samples tell: captions and where they stand, pictures' sizes, classes."""

from __future__ import annotations

import io
import itertools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from raychain.core.json import Json
from raychain.data.addresses import expand
from raychain.data.fetch import open_input
from raychain.data.members import IMAGES
from raychain.data.sentences import sentences
from raychain.data.tar import split_name, walk
from raychain.errors import InputError
from raychain.schema.captions import LINES, SENTENCES, KeySplit

SAMPLES = 200
"""Samples that are read of a shard."""
SHARDS = 2
"""Shards that are read: the first and the last."""
BLOCK = 512
LONGEST = 2**22
"""Bytes of a member that is read."""
SHARE = 0.5
"""Samples that must have a key for it to count."""
SPLITS: tuple[KeySplit, ...] = ("first", "last")
Members = dict[str, Callable[[], bytes]]
"""What reads each member of a sample, by extension."""


@dataclass(frozen=True)
class Key:
    """A place where captions stand."""

    name: str
    """The name of the captions, as `data.captions.keys` takes it."""
    captions: float
    """Captions a sample, on average."""
    words: float
    """Words of a caption, on average."""
    example: str


@dataclass(frozen=True)
class Held:
    """What shards hold."""

    shards: int = 0
    samples: int = 0
    """Estimated: what the shards' sizes say at the bytes that a sample took where it was read; 0 is unknown."""
    read: int = 0
    """Samples that were read."""
    pictures: int = 0
    """How many of these have a picture."""
    keys: tuple[Key, ...] = ()
    """Where captions stand: text members first."""
    classes: int = 0
    """Different values of `cls` among what was read; 0 where it is no part of samples."""
    side: int = 0
    """Shorter side of a picture in pixels, the median; 0 without pictures."""
    key_split: KeySplit = "first"
    extensions: tuple[str, ...] = ()
    """Extensions of members that at least half of the samples have."""

    def __str__(self) -> str:
        if not self.read:
            return "nothing: it was not looked at"
        what = [f"{self.shards:,} shards, about {self.samples:,} samples ({self.read:,} read)"]
        if self.pictures:
            what.append(f"pictures of {self.side} pixels (shorter side, median)")
        what += [f"captions in {key.name}: {key.captions:.3g} each, {key.words:.3g} words" for key in self.keys]
        if self.classes:
            what.append(f"classes (cls): {self.classes} among them")
        return "\n".join(what)


@dataclass
class _Seen:
    """Samples as they come."""

    read: int = 0
    pictures: int = 0
    sides: list[int] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)
    texts: dict[str, list[list[str]]] = field(default_factory=dict)
    """Captions of each sample by key."""
    extensions: Counter[str] = field(default_factory=Counter)

    def add(self, sample: Members) -> None:
        self.read += 1
        self.extensions.update(sample.keys())
        for name, content in sample.items():
            if name in IMAGES:
                self._picture(content())
            elif name == "cls":
                self.classes.add(content()[:40].decode(errors="replace").strip())
            elif name == "txt":
                self.texts.setdefault("txt", []).append([content().decode(errors="replace")])
            elif name == "json":
                for key, texts in _texts(content()):
                    self.texts.setdefault(f"json.{key}", []).append(texts)

    def _picture(self, content: bytes) -> None:
        self.pictures += 1
        try:
            with Image.open(io.BytesIO(content)) as image:
                self.sides.append(min(image.size))
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
            return


def probe(data: Sequence[str]) -> Held:
    """Reads the first samples of the first and the last shard at the addresses. Raises InputError."""
    addresses = expand(data, "--data")
    chosen = list(dict.fromkeys((addresses[0], addresses[-1])))[:SHARDS]
    first = _read(chosen, "first")
    seen, split = first, SPLITS[0]
    if not any(name in first[0].extensions for name in IMAGES) and any("." in name for name in first[0].extensions):
        other = _read(chosen, "last")
        if other[0].pictures > first[0].pictures:
            seen, split = other, SPLITS[1]
    found, estimate = seen
    if not found.read:
        raise InputError("--data", chosen[0], "complete tar files with samples", "`raychain data check` says more")
    per_shard = estimate / len(chosen)
    return Held(
        shards=len(addresses),
        samples=max(found.read, round(per_shard * len(addresses))),
        read=found.read,
        pictures=found.pictures,
        keys=_keys(found),
        classes=len(found.classes) if found.extensions["cls"] >= SHARE * found.read else 0,
        side=round(statistics.median(found.sides)) if found.sides else 0,
        key_split=split,
        extensions=tuple(name for name, many in found.extensions.items() if many >= SHARE * found.read),
    )


def _read(addresses: Sequence[str], at: KeySplit) -> tuple[_Seen, float]:
    """What the first samples of the shards hold, and how many samples the shards have by their sizes."""
    seen, estimate = _Seen(), 0.0
    for address in addresses:
        try:
            with open_input(address) as file:
                size = file.seek(0, io.SEEK_END)
                before, taken = seen.read, 0
                for sample, length in itertools.islice(_samples(file, at), SAMPLES):
                    seen.add(sample)
                    taken += length
        except OSError as error:
            raise InputError("--data", address, "a tar file that can be read", str(error)) from None
        read = seen.read - before
        estimate += read if read < SAMPLES else size * read / taken
    return seen, estimate


def _samples(file: BinaryIO, at: KeySplit) -> Iterator[tuple[Members, int]]:
    """Samples, each with what reads its members, and the bytes that it takes in the tar file."""
    current: str | None = None
    sample: Members = {}
    length = 0
    for member in walk(file, lambda *_: None, at):
        key, extension = split_name(member.name, at)
        if key is None or extension is None or member.content is None:
            continue
        if key != current and sample:
            yield sample, length
            sample, length = {}, 0
        current = key
        length += BLOCK + -(-member.size // BLOCK) * BLOCK
        sample[extension.lower()] = member.content if member.size <= LONGEST else bytes
    if sample:
        yield sample, length


def _texts(content: bytes) -> Iterator[tuple[str, list[str]]]:
    """The texts of a JSON member that read like captions, by key, one level down too."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return
    if not isinstance(document, dict):
        return
    for key, value in document.items():
        inner: Json = value if isinstance(value, dict) else {}
        for name, found in [(key, value), *((f"{key}.{part}", own) for part, own in inner.items())]:
            texts = [text for text in (found if isinstance(found, list) else [found]) if isinstance(text, str)]
            if texts and "|" not in name and all(_reads_like_a_caption(text) for text in texts):
                yield name, texts


def _reads_like_a_caption(text: str) -> bool:
    text = text.strip()
    return " " in text and text[0] not in "{[<" and "://" not in text and any(c.isalpha() for c in text)


def _keys(seen: _Seen) -> tuple[Key, ...]:
    """Where captions stand; a key that repeats the text member says nothing new."""
    found: list[Key] = []
    plain = [texts[0].strip() for texts in seen.texts.get("txt", [])]
    for name, samples in sorted(seen.texts.items(), key=lambda item: item[0] != "txt"):
        if len(samples) < SHARE * seen.read or (name != "txt" and [t[0].strip() for t in samples] == plain):
            continue
        texts, suffix = samples, ""
        if statistics.mean(len(sample[0].strip().splitlines()) for sample in samples) >= 2:
            texts, suffix = [[line for text in sample for line in text.splitlines()] for sample in samples], f"|{LINES}"
        elif statistics.mean(len(sentences(sample[0])) for sample in samples) >= 2:
            texts, suffix = [[s for text in sample for s in sentences(text)] for sample in samples], f"|{SENTENCES}"
        flat = [text.strip() for sample in texts for text in sample if text.strip()]
        if flat:
            words = statistics.mean(len(text.split()) for text in flat)
            found.append(Key(name + suffix, len(flat) / len(samples), words, flat[0]))
    return tuple(found)
