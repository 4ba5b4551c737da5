"""True sentences about a picture: what is in it, where, and on what background."""

import re
from dataclasses import dataclass
from random import Random

from raychain.demo.compositions import Recipe
from raychain.demo.names import with_article

TOKENS = 18  # what the small text towers read, start and end included
SMALL, LARGE = 0.58, 0.8  # a single glyph's side as a share of the picture's, below and above which it is called so
# Every training picture of one name has captions of these forms, which therefore suit zero-shot classification.
ZERO_SHOT_TEMPLATES = ("the {c} emoji", "a drawing of the {c} emoji", "a picture of the {c} emoji")


@dataclass(frozen=True, slots=True)
class Described:
    """A picture's captions, the most telling first, and the relation that first caption states, if any.

    `names[0]` is `relation` `names[1]`: ("cat", "key"), "right of".
    """

    captions: tuple[str, ...]
    names: tuple[str, ...]
    relation: str | None


def describe(recipe: Recipe, names: list[str], scale: float, rng: Random) -> Described:
    """Five different captions of a picture; `scale` is a single glyph's side as a share of the picture's."""
    if recipe.second is None:
        return _describe_one(recipe, names[recipe.first], scale, rng)
    return _describe_two(recipe, names[recipe.first], names[recipe.second], rng)


def _describe_one(recipe: Recipe, name: str, scale: float, rng: Random) -> Described:
    noun = with_article(name)
    size = "small" if scale < SMALL else "large" if scale > LARGE else "medium-sized"
    others = [
        ZERO_SHOT_TEMPLATES[0].format(c=name),
        rng.choice(ZERO_SHOT_TEMPLATES[1:]).format(c=name),
        *rng.sample(
            [
                f"a picture of {noun}",
                f"a {size} drawing of {noun}",
                f"{noun} on {_a(recipe.colour)} background",
                f"{name} on {recipe.colour}",
                noun,
            ],
            2,
        ),
    ]
    rng.shuffle(others)
    return Described((f"{noun} on {_a(_background(recipe))} background", *others), (name,), None)


def _describe_two(recipe: Recipe, first: str, second: str, rng: Random) -> Described:
    forward, backward = ("above", "below") if recipe.vertical else ("left of", "right of")
    here, there = ("at the top", "at the bottom") if recipe.vertical else ("on the left", "on the right")
    if rng.random() < 0.5:
        first, second, forward, backward, here, there = second, first, backward, forward, there, here
    a, b = with_article(first), with_article(second)
    said, reverse = f"{a} {_wordy(forward, rng)} {b}", f"{b} {_wordy(backward, rng)} {a}"
    drawn = rng.choice([said, reverse])
    others = [
        _fitting(reverse, f"{b} {backward} {a}", f"{second} {backward} {first}"),
        _fitting(f"a drawing of {drawn}", f"drawing: {first} {forward} {second}"),
        _fitting(f"{a} and {b} on {_a(_background(recipe))} background", f"{first} and {second} on {recipe.colour}"),
        _fitting(f"{a} {here} and {b} {there}", f"{first} {here}, {second} {there}"),
    ]
    rng.shuffle(others)
    return Described(
        (_fitting(said, f"{a} {forward} {b}", f"{first} {forward} {second}"), *others), (first, second), forward
    )


def _wordy(relation: str, rng: Random) -> str:
    return f"to the {relation}" if relation.endswith("of") and rng.random() < 0.5 else relation


def _background(recipe: Recipe) -> str:
    return f"{recipe.colour} gradient" if recipe.kind == "gradient" else f"{recipe.kind} {recipe.colour}"


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _fitting(*wordings: str) -> str:
    """The first wording that fits `TOKENS` by a rough count (a word is one token, a long one two), else the last."""
    return next((wording for wording in wordings if _rough_tokens(wording) <= TOKENS), wordings[-1])


def _rough_tokens(caption: str) -> int:
    return 2 + sum(2 if len(piece) > 8 else 1 for piece in re.findall(r"[^\W\d]+|\d|[^\s\w]", caption))
