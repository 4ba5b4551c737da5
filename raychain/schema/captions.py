"""How `data.captions.keys` name captions: `txt`, `json.KEY`, and either with `|sentences` or `|lines`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from raychain.errors import nearest

KeySplit = Literal["first", "last"]
"""At which dot of a tar member's name the extension begins, as `data.key_split` says."""
SENTENCES, LINES = "sentences", "lines"
ALLOWED = f"txt, json.KEY, txt|{SENTENCES}, json.KEY|{SENTENCES}, txt|{LINES} or json.KEY|{LINES}"
_MEMBER = re.compile(r"[A-Za-z0-9_-]+(\.[^.|]+)*")


@dataclass(frozen=True)
class CaptionKey:
    """One entry of `data.captions.keys`, taken apart."""

    extension: str
    """Extension of the tar member."""
    path: tuple[str, ...]
    """Keys from the top of a JSON member down; none: the member is text."""
    sentences: bool
    """Each text is a description of several sentences, and every sentence is a caption."""
    lines: bool = False
    """Every line of a text is a caption, as in clip_benchmark's retrieval shards."""


def caption_key(text: str) -> CaptionKey:
    """`json.a.b|sentences` taken apart. Raises ValueError, which says what is allowed."""
    member, mark, suffix = text.partition("|")
    if mark and suffix not in (SENTENCES, LINES):
        raise ValueError(f"{ALLOWED}; unknown suffix |{suffix}, {nearest(suffix, [SENTENCES, LINES], 'remove it')}")
    if not _MEMBER.fullmatch(member) or member == "json":
        raise ValueError(ALLOWED)
    extension, *path = member.split(".")
    return CaptionKey(extension, tuple(path), suffix == SENTENCES, suffix == LINES)
