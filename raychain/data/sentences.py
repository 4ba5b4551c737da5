"""A description split into its sentences by rules for English that leave other languages' sentences whole or right."""

from __future__ import annotations

import re

_END = re.compile(r"([.!?…]+)([\"'”’»)\]]*)\s+(?=\S)|[。！？]+[」』”’]*\s*")
"""Where a sentence may end: marks and closing quotes before white space, or full-width marks."""
_ABBREVIATIONS = frozenset((
    "adm", "approx", "apt", "assoc", "ave", "blvd", "bldg", "capt", "cf", "cmdr", "dept", "dr", "fig", "figs", "gov",
    "hwy", "jr", "lt", "ltd", "maj", "messrs", "mr", "mrs", "ms", "mt", "mts", "nos", "pp", "prof", "rev", "rt", "sen",
    "sgt", "sr", "st", "ste", "univ", "vol", "vs",
))  # fmt: skip
"""Words, in lower case, whose full stop ends no sentence."""
_BEFORE_NUMBERS = frozenset(("art", "ca", "ch", "ed", "no", "p", "sec"))
"""Words whose full stop ends no sentence where a digit follows."""
_ENDING = frozenset(("a.m", "p.m"))
"""Dotted abbreviations whose full stop may end a sentence too: it does where a capital follows."""
_LAST_WORD = re.compile(r"[^\s(\[\"'“‘]*$")
_LIST_NUMBER = re.compile(r"\W*\d+")
_DOTTED = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")
"""`e.g`, `U.S`, and initials such as the J of J. Smith."""


def sentences(text: str) -> list[str]:
    """The sentences of a text in order, each with its marks; what holds no letter or digit is left out.

    Lines are split too. A full stop ends no sentence inside a number or a word, after an abbreviation (`Mr.`, `e.g.`),
    an initial or a list's number (`1. A dog`); an ellipsis, or a mark inside quotes, ends none before a small letter.
    """
    found = [sentence for line in text.splitlines() for sentence in _split(line)]
    return [sentence for sentence in found if any(c.isalnum() for c in sentence)]


def _split(line: str) -> list[str]:
    parts, start = [], 0
    for end in _END.finditer(line):
        if _ends(line[start : end.start()], end, line[end.end() : end.end() + 1]):
            parts.append(line[start : end.end()].strip())
            start = end.end()
    return [*parts, line[start:].strip()]


def _ends(before: str, end: re.Match[str], following: str) -> bool:
    mark, closing = end.group(1), end.group(2)
    if mark is None:  # full-width
        return True
    if following.islower() and (closing or mark == "…" or mark.startswith("..")):
        return False
    if mark != ".":
        return True
    found = _LAST_WORD.search(before)
    word = found.group().lower() if found else ""
    if _LIST_NUMBER.fullmatch(before):
        return False
    if word in _ENDING:
        return following.isupper()
    if word in _BEFORE_NUMBERS and following.isdigit():
        return False
    return word not in _ABBREVIATIONS and not _DOTTED.fullmatch(word)
