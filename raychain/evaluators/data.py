"""What is measured: the user's addresses checked before anything starts, and made into plain values for the workers."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from raychain.core.storage import Folder, below
from raychain.data import addresses, shards
from raychain.data.content import unchanged
from raychain.data.fetch import open_input
from raychain.data.health import STRUCTURAL
from raychain.data.members import LARGEST, Wanted
from raychain.data.members import classes as classes_of
from raychain.data.shards import Shard
from raychain.data.tar import split_name, walk
from raychain.errors import InputError
from raychain.records import document
from raychain.schema.captions import KeySplit

if TYPE_CHECKING:
    from torch import nn

    from raychain.evaluators.context import Context

Protocol = Literal["ridge", "clip_benchmark"]
ZERO_SHOT, RETRIEVAL = "evaluate.zero_shot", "evaluate.retrieval"
CLASSES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
SPLIT = "test"
"""Folder of the shards."""
SLOT = "{c}"
"""What a template holds in place of the class name."""
DEFAULT_TEMPLATES = (f"a photo of a {SLOT}.",)
KIND, MULTILABEL = "dataset_type.txt", "multilabel"
"""The file that says what a folder is for, and what it says where pictures have several labels."""


@dataclass(frozen=True)
class Prompted:
    """Pictures, the names of their classes in the order of the labels, and the prompts around a name."""

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    shards: tuple[Shard, ...]
    key_split: KeySplit = "first"

    @property
    def samples(self) -> int:
        """Pictures."""
        return sum(shard.samples for shard in self.shards)

    def prompts(self, name: str) -> list[str]:
        """The class name in each template."""
        return [template.replace(SLOT, name) for template in self.templates]


@dataclass(frozen=True)
class ZeroShotData(Prompted):
    """Pictures with a label each."""

    @property
    def wanted(self) -> Wanted:
        """What a sample must hold."""
        return Wanted(label=True, key_split=self.key_split)

    @property
    def digest(self) -> str:
        """Identity of what is measured: the pictures' content, the names and the templates; not where they lie."""
        return digest("zero-shot", identities(self.shards), (self.classes, self.templates), self.key_split)

    @property
    def former(self) -> str:
        """The digest of schema 2."""
        former = [shard.former for shard in self.shards]
        return digest("zero-shot", former, (self.classes, self.templates), self.key_split)

    def run(self, model: nn.Module, context: Context) -> dict[str, float]:
        """See `evaluators.zero_shot`."""
        from raychain.evaluators.zero_shot import zero_shot

        return zero_shot(context.encoder(model), self)


@dataclass(frozen=True)
class MultilabelData(Prompted):
    """Pictures that show any number of classes each."""

    @property
    def wanted(self) -> Wanted:
        """What a sample must hold."""
        return Wanted(classes=True, key_split=self.key_split)

    @property
    def digest(self) -> str:
        """Identity of what is measured, as for `ZeroShotData`."""
        names = self.classes, self.templates
        return digest("zero-shot-multilabel", identities(self.shards), names, self.key_split)

    def run(self, model: nn.Module, context: Context) -> dict[str, float]:
        """See `evaluators.zero_shot`."""
        from raychain.evaluators.zero_shot import zero_shot_multilabel

        return zero_shot_multilabel(context.encoder(model), self)


@dataclass(frozen=True)
class RetrievalData:
    """Pictures with captions, and the members that hold the captions."""

    caption_keys: tuple[str, ...]
    shards: tuple[Shard, ...]
    key_split: KeySplit = "first"

    @property
    def wanted(self) -> Wanted:
        """What a sample must hold."""
        return Wanted(captions=self.caption_keys, key_split=self.key_split)

    @property
    def digest(self) -> str:
        """Identity of what is measured: the pictures' content and the caption keys; not where they lie."""
        return digest("retrieval", identities(self.shards), self.caption_keys, self.key_split)

    @property
    def former(self) -> str:
        """The digest of schema 2."""
        return digest("retrieval", [shard.former for shard in self.shards], self.caption_keys, self.key_split)

    @property
    def samples(self) -> int:
        """Pictures."""
        return sum(shard.samples for shard in self.shards)

    def run(self, model: nn.Module, context: Context) -> dict[str, float]:
        """See `evaluators.retrieval`."""
        from raychain.evaluators.retrieval import retrieval

        return retrieval(context.encoder(model), self)


@dataclass(frozen=True)
class LinearProbeData:
    """Labelled pictures to fit a classifier on frozen features, and others to test it."""

    classes: int
    train: tuple[Shard, ...]
    test: tuple[Shard, ...]
    protocol: Protocol
    key_split: KeySplit = "first"

    @property
    def wanted(self) -> Wanted:
        """What a sample must hold."""
        return Wanted(label=True, key_split=self.key_split)

    @property
    def digest(self) -> str:
        """Identity of what is measured: the pictures' content and the protocol; not where they lie."""
        # in the protocol of clip_benchmark the order of the shards matters
        details = self.protocol, self.classes, identities(self.train)
        return digest("linear-probe", identities(self.test), details, self.key_split)

    @property
    def samples(self) -> int:
        """Pictures."""
        return sum(shard.samples for shard in (*self.train, *self.test))

    def run(self, model: nn.Module, context: Context) -> dict[str, float]:
        """See `evaluators.linear_probe`."""
        from raychain.evaluators.linear_probe import linear_probe

        return linear_probe(context.encoder(model), self)


def resolve_zero_shot(
    address: str, cache_dir: str | Path, where: str = ZERO_SHOT, key_split: KeySplit = "first"
) -> ZeroShotData:
    """The zero-shot task in a folder of clip_benchmark's webdataset layout, local or remote.

    The folder holds `classnames.txt` (line i names label i), `zeroshot_classification_templates.txt` (a prompt a line
    with `{c}` for the name; without the file "a photo of a {c}.") and `test/*.tar` with pictures and `.cls` members.
    Counts and label ranges of the shards are kept in `cache_dir`. `where` is the option that errors name, `key_split`
    as in `data`.

    Raises InputError where names or shards are missing, cannot be read or hold nothing, for a template without `{c}`,
    for labels without a class name, and for a folder whose `dataset_type.txt` says `multilabel`.
    """
    if _lines(address, KIND, where)[:1] == [MULTILABEL]:
        raise InputError(where, f"{address}, whose {KIND} says {MULTILABEL}", "a folder of pictures with a label each",
                         "measure it by the evaluator zero_shot_multilabel")  # fmt: skip
    wanted = Wanted(label=True, key_split=key_split)
    found = _prompted(address, wanted, cache_dir, where)
    allowed = f"0 … {len(found.classes) - 1}, the lines of {CLASSES}"
    check_labels(found.shards, wanted, cache_dir, where, len(found.classes), allowed, f"complete {CLASSES}")
    return ZeroShotData(found.classes, found.templates, found.shards, key_split)


def resolve_multilabel(
    address: str, cache_dir: str | Path, where: str, key_split: KeySplit = "first"
) -> MultilabelData:
    """The zero-shot task of pictures that show any number of classes, in a folder as for `resolve_zero_shot`.

    Instead of `.cls` members there are `.npy` members: one-dimensional arrays of zeros, and of ones for the classes
    that a picture shows. Raises InputError as `resolve_zero_shot` does, and for arrays of another length than there are
    class names.
    """
    wanted = Wanted(classes=True, key_split=key_split)
    found, cache = _prompted(address, wanted, cache_dir, where), Path(cache_dir).expanduser()
    for shard in found.shards:
        if wrong := [n for n in _labels(shard, wanted, cache, where) if n != len(found.classes)]:
            raise InputError(where, f"an .npy member for {wrong[0]} classes in {shard.address}",
                             f"{len(found.classes)}, the lines of {CLASSES}", f"correct {CLASSES}")  # fmt: skip
    return MultilabelData(found.classes, found.templates, found.shards, key_split)


def _prompted(address: str, wanted: Wanted, cache_dir: str | Path, where: str) -> Prompted:
    """The names, templates and shards of a zero-shot task. Raises InputError."""
    classes = _lines(address, CLASSES, where)
    while classes and not classes[-1]:
        classes.pop()
    if not classes:
        raise InputError(where, address, f"a folder with {CLASSES}, test/*.tar and, if wanted, {TEMPLATES}",
                         f"write the class names to {CLASSES}, a line each, in the order of the labels")  # fmt: skip
    templates = tuple(line for line in _lines(address, TEMPLATES, where) if line) or DEFAULT_TEMPLATES
    for template in templates:
        if SLOT not in template:
            raise InputError(where, f"the template {template!r} in {address}/{TEMPLATES}",
                             f"templates with {SLOT} where the class name belongs", f"add {SLOT} to it")  # fmt: skip
    shards = surveyed([below(address, SPLIT)], wanted, cache_dir, where)
    return Prompted(tuple(classes), templates, shards, wanted.key_split)


def resolve_retrieval(
    patterns: Sequence[str],
    caption_keys: Sequence[str],
    cache_dir: str | Path,
    where: str = RETRIEVAL,
    key_split: KeySplit = "first",
) -> RetrievalData:
    """The retrieval task on the shards that the patterns name; `caption_keys` and `key_split` as in `data`.

    All captions of a picture that the keys name are used. Counts of the shards are kept in `cache_dir`.
    `where` is the option that errors name.

    Raises InputError for patterns that match nothing and for shards that are damaged or hold no picture with a caption.
    """
    keys = tuple(caption_keys)
    return RetrievalData(keys, surveyed(patterns, Wanted(keys, key_split=key_split), cache_dir, where), key_split)


def resolve_linear_probe(
    train: Sequence[str],
    test: Sequence[str],
    protocol: Protocol,
    cache_dir: str | Path,
    where: str,
    key_split: KeySplit = "first",
) -> LinearProbeData:
    """The linear probe of a classifier that is fitted on the shards of `train` and tested on those of `test`.

    Raises InputError for patterns that match nothing, for shards that are damaged or hold no labelled picture, and for
    labels that training does not show.
    """
    wanted = Wanted(label=True, key_split=key_split)
    fitted, tested = (surveyed(patterns, wanted, cache_dir, where) for patterns in (train, test))
    classes = check_labels(fitted, wanted, cache_dir, where, None, "labels from 0 on", "correct the .cls members")
    allowed = f"0 … {classes - 1}, the labels of the training shards"
    check_labels(tested, wanted, cache_dir, where, classes, allowed, "give shards of the same classes")
    return LinearProbeData(classes, fitted, tested, protocol, key_split)


def check_labels(
    found: Sequence[Shard],
    wanted: Wanted,
    cache_dir: str | Path,
    where: str,
    classes: int | None,
    allowed: str,
    fix: str,
) -> int:
    """How many classes the shards have, up to the largest label. Raises InputError for labels outside of `classes`."""
    cache = Path(cache_dir).expanduser()
    with ThreadPoolExecutor(16) as pool:
        labels = list(pool.map(lambda shard: _labels(shard, wanted, cache, where), found))
    for shard, (low, high) in zip(found, labels, strict=True):
        if low < 0 or (classes is not None and high >= classes):
            raise InputError(where, f"label {low if low < 0 else high} in {shard.address}", allowed, fix)
    return max(high for _, high in labels) + 1


def surveyed(patterns: Sequence[str], wanted: Wanted, cache_dir: str | Path, where: str) -> tuple[Shard, ...]:
    found = shards.survey(addresses.expand(patterns, where), wanted, Path(cache_dir).expanduser(), where, exact=True)
    for shard in found:  # training can do without a few samples; what is measured must not depend on the copy at hand
        if damage := [bad for bad in shard.bad.examples if bad.kind in STRUCTURAL]:
            fix = f"replace or remove the shard ({damage[0]})"
            raise InputError(where, shard.address, "a complete tar file", fix)
    return tuple(shard for shard in found if shard.samples)


def _lines(address: str, name: str, where: str) -> list[str]:
    """Lines of a file of the folder, stripped; none if it does not exist."""
    try:
        folder = Folder(address)
        if not folder.exists(""):
            raise InputError(where, address, "a folder that exists", "correct the address, or make the folder")
        content = folder.read(name)
        return [line.strip() for line in (content or b"").decode().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(where, f"{address}/{name}", "a UTF-8 text file", f"make it readable ({error})") from None


def _labels(shard: Shard, wanted: Wanted, cache: Path, where: str) -> tuple[int, int]:
    """Smallest and largest label of a shard, or number of classes, without what is none. Pictures are skipped, not
    read.
    """
    of = "classes" if wanted.classes else "labels"
    noted = cache / "counts" / f"{shard.identity}-{of}{'' if wanted.key_split == 'first' else '-last'}.json"
    known = document(noted.read_bytes()) if noted.is_file() else None
    if isinstance(known, list) and len(known) == 2 and all(type(label) is int for label in known):
        return known[0], known[1]
    labels = []
    try:
        with unchanged(shard), open_input(shard.address) as file:
            for name, size, content in walk(file, lambda *_: None, wanted.key_split):
                _, extension = split_name(name, wanted.key_split)
                if content and extension and extension.lower() in wanted.extensions and size <= LARGEST:
                    with contextlib.suppress(ValueError):  # one broken sample of many: reading skips it with a warning
                        labels.append(len(classes_of(content())) if wanted.classes else int(content()))
    except OSError as error:
        raise InputError(where, shard.address, "a complete tar file", f"replace or remove it ({error})") from None
    if not labels:
        allowed, fix = "one whole number in each .cls member", f"write the line number in {CLASSES}, counted from 0"
        if wanted.classes:
            allowed, fix = "a row of zeros and ones in each .npy member", f"write one for each line of {CLASSES}"
        raise InputError(where, f"{shard.address} without a usable label", allowed, fix)
    noted.write_text(json.dumps((min(labels), max(labels))))
    return min(labels), max(labels)


def identities(found: Sequence[Shard]) -> list[str]:
    return [shard.identity for shard in found]


def digest(task: str, identities: Sequence[str], details: object, key_split: KeySplit) -> str:
    how = () if key_split == "first" else (key_split,)
    text = repr((task, sorted(identities), details, *how))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
