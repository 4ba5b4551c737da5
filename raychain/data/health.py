"""What is wrong with samples: counted by kind, with the first of each kind as examples. Pure, but for one log line."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeVar

from PIL import Image, UnidentifiedImageError

from raychain.records import TallyRecord

log = logging.getLogger("raychain.data")

Picture = TypeVar("Picture")

TRUNCATED, HEADER = "truncated shard", "damaged header"
UNSAFE, LINK, SPARSE, DUPLICATE = "unsafe name", "link or device", "sparse file", "duplicate key"
DOTTED, HUGE = "dot in name", "huge member"
NO_PICTURE, EMPTY_PICTURE, UNREADABLE, BOMB = (
    "missing picture", "empty picture", "unreadable picture", "decompression bomb",
)  # fmt: skip
NO_CAPTION, NO_LABEL, TEXT = "missing caption", "missing label", "invalid text"
DEEP = "grey of more than 8 bits"
USED = (DEEP,)
"""Kinds of samples that are used, and worth a word nevertheless."""
STRUCTURAL = (TRUNCATED, HEADER)
"""Kinds that cost an unknown number of samples and count as one each."""
EXAMPLES = 3
"""Kept of each kind."""


class Bad(NamedTuple):
    """One sample, or one place in a shard, that cannot be used."""

    kind: str
    key: str
    """The sample's, or the member's name."""
    detail: str = ""

    def __str__(self) -> str:
        text = f"{self.key} ({self.kind}{': ' if self.detail else ''}{self.detail})"
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)  # terminals obey the others


class Unusable(Exception):  # noqa: N818 - the name says what the sample is
    """A sample that cannot be used: `kind`, and in words why."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Tally:
    """How many of each kind were found, and the first few."""

    counts: Mapping[str, int] = field(default_factory=dict)
    examples: tuple[Bad, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        return f"{kinds(self.counts)}: {', '.join(map(str, self.examples))}"

    @property
    def total(self) -> int:
        """Unusable samples of all kinds together."""
        return sum(self.counts.values())

    def part(self, used: bool) -> Tally:
        """The kinds that are used nevertheless, or those that are not."""
        counts = {kind: count for kind, count in self.counts.items() if (kind in USED) == used}
        return Tally(counts, tuple(bad for bad in self.examples if bad.kind in counts))

    def record(self) -> TallyRecord:
        """The tally as records hold it."""
        return TallyRecord(counts=dict(self.counts), examples=[list(bad) for bad in self.examples])

    @classmethod
    def of(cls, record: TallyRecord) -> Tally:
        """The reverse of `record`."""
        return cls(dict(record.counts), tuple(Bad(*example) for example in record.examples))


def tally(found: Iterable[Bad]) -> Tally:
    """Counts what was found."""
    counts: Counter[str] = Counter()
    examples = []
    for bad in found:
        counts[bad.kind] += 1
        if counts[bad.kind] <= EXAMPLES:
            examples.append(bad)
    return Tally(dict(counts), tuple(examples))


def kinds(counts: Mapping[str, int]) -> str:
    """`3 missing caption, 1 truncated shard`, the most frequent first."""
    return ", ".join(f"{n:,} {kind}" for kind, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def name(address: str, bad: Tally) -> None:
    """Names a shard's bad samples in the log, once a process however often it is read."""
    if bad:
        _log(f"{address}: skipped {bad}")


def note(address: str, noted: Tally) -> None:
    """Names pictures in the log that are used as open_clip turns them, once a process."""
    if noted:
        _log(f"{address}: {noted}: open_clip, and so this measurement, clips them to 8 bits, mostly to white")


@cache
def _log(message: str) -> None:
    log.warning("%s", message)


def picture(decoder: Callable[..., Picture], *arguments: Any) -> Picture:
    """What `decoder` returns. Raises Unusable whatever that raises: for damaged pictures Pillow raises nearly all."""
    try:
        return decoder(*arguments)
    except Unusable:
        raise
    except Image.DecompressionBombError as error:
        raise Unusable(BOMB, str(error)) from None
    except UnidentifiedImageError:  # whose own message holds a memory address
        raise Unusable(UNREADABLE, "no picture that Pillow knows") from None
    except Exception as error:
        raise Unusable(UNREADABLE, str(error)) from None
