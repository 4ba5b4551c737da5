"""How much a pattern with braces stands for: `braceexpand` makes all of it, even to give the first."""

from __future__ import annotations

import re
from itertools import pairwise

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(\.\.-?\d+)?")
_LETTERS = 52
"""What `{a..z}` stands for at most."""


def count_alternatives(text: str) -> int:
    """How many strings braces stand for at most, without making them: each group of alternatives or of numbers."""
    total, depth, start, commas = 1, 0, 0, [0]
    for place, character in enumerate(text):
        if character == "{":
            depth += 1
            if depth == 1:
                start, commas = place + 1, [place]
        elif character == "," and depth == 1:
            commas.append(place)
        elif character == "}" and depth:
            depth -= 1
            if depth == 0 and (numbers := _RANGE.fullmatch(body := text[start:place])):
                total *= abs(int(numbers[1]) - int(numbers[2])) + 1
            elif depth == 0:
                parts = [text[a + 1 : b] for a, b in pairwise([*commas, place])]
                total *= sum(map(count_alternatives, parts)) * (_LETTERS if ".." in body and len(parts) == 1 else 1)
    return total
