"""The pictures that there are, and the split that each belongs to: pure arithmetic on name numbers, no drawing.

A composition is an unordered pair of names in one of four arrangements, or one name on one of 60 backgrounds (kind and
colour). Pairs held out for validation or test never meet in training, in no arrangement; nor does a name that stands
alone meet a background held out for it.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random
from typing import Literal

KINDS = ("plain", "gradient", "striped", "dotted", "checkered", "noisy")
COLOURS = ("white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
SINGLE_SHARE = {"train": 0.4, "held out": 0.15}
HELD_OUT_PAIRS = 0.1  # at most this share of all pairs, for each of the two held-out splits
BACKGROUNDS_HELD_OUT = 6  # of the 60 of each name, for each of the two held-out splits
LEAST_NAMES = 4  # below, a name could be left without a partner in training

HeldOut = Literal["validation", "test"]
Split = Literal["train", "validation", "test"]
Background = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is in one picture: name number `first` left of `second`, or above it if `vertical`; or `first` alone."""

    first: int
    second: int | None
    vertical: bool
    kind: str
    colour: str


@dataclass(frozen=True)
class Compositions:
    """All recipes of a demo, from its arguments alone, so that every process derives the same ones.

    Args:
        names: number of names, at least `LEAST_NAMES`.
        seed: decides the split and the draw.
        held_out: pictures wanted in each retrieval split; fewer come where few names leave fewer compositions.
    """

    names: int
    seed: int
    held_out: int

    def train(self, start: int, count: int) -> list[Recipe]:
        """Recipes `start` … `start + count` of the training set; any `names` in a row, unshuffled, hold every name."""
        rng = self._rng("train", start)
        order = _training_order(self.names, self.seed)
        recipes = [self._training_recipe(order[place % self.names], rng) for place in range(start, start + count)]
        rng.shuffle(recipes)
        return recipes

    def retrieval(self, split: HeldOut) -> list[Recipe]:
        """Distinct held-out compositions: mostly pairs, and single ones of distinct names.

        A pair may come in several arrangements, each on its own colour, so every picture's captions describe it alone.
        """
        rng = self._rng("retrieval", split)
        pairs = _held_out_pairs(self)[split]
        wanted = self.held_out - self._singles_held_out
        recipes = []
        for place in sorted(rng.sample(range(4 * len(pairs)), min(wanted, 4 * len(pairs)))):
            (first, second), arrangement = pairs[place // 4], place % 4
            if arrangement % 2:
                first, second = second, first
            colour = COLOURS[(first + second + arrangement) % len(COLOURS)]
            recipes.append(Recipe(first, second, arrangement >= 2, rng.choice(KINDS), colour))
        for name in rng.sample(range(self.names), self._singles_held_out):
            recipes.append(Recipe(name, None, False, *rng.choice(self.backgrounds(name, split))))
        rng.shuffle(recipes)
        return recipes

    def zero_shot(self, split: HeldOut, per_name: int) -> list[Recipe]:
        """`per_name` single recipes of every name on its held-out backgrounds, shuffled."""
        rng = self._rng("zero-shot", split)
        recipes = []
        for name in range(self.names):
            backgrounds = self.backgrounds(name, split)
            recipes += [Recipe(name, None, False, *backgrounds[i % len(backgrounds)]) for i in range(per_name)]
        rng.shuffle(recipes)
        return recipes

    def backgrounds(self, name: int, split: Split) -> list[Background]:
        """The (kind, colour) backgrounds on which a single `name` may stand in `split`."""
        cut = BACKGROUNDS_HELD_OUT
        mixed = _mixed_backgrounds(self.seed, name)
        return {"validation": mixed[:cut], "test": mixed[cut : 2 * cut], "train": mixed[2 * cut :]}[split]

    @property
    def _singles_held_out(self) -> int:
        return min(self.names, round(SINGLE_SHARE["held out"] * self.held_out))

    def _training_recipe(self, name: int, rng: Random) -> Recipe:
        if rng.random() < SINGLE_SHARE["train"]:
            return Recipe(name, None, False, *rng.choice(self.backgrounds(name, "train")))
        forbidden = _forbidden_pairs(self)
        partner = name
        while partner == name or (min(name, partner), max(name, partner)) in forbidden:
            partner = rng.randrange(self.names)
        first, second = (name, partner) if rng.random() < 0.5 else (partner, name)
        return Recipe(first, second, rng.random() < 0.5, rng.choice(KINDS), rng.choice(COLOURS))

    def _rng(self, *purpose: object) -> Random:
        return Random(f"{self.seed}/{purpose}")


@cache
def _training_order(names: int, seed: int) -> list[int]:
    order = list(range(names))
    Random(f"{seed}/order").shuffle(order)
    return order


@cache
def _mixed_backgrounds(seed: int, name: int) -> list[Background]:
    mixed = list(product(KINDS, COLOURS))
    Random(f"{seed}/backgrounds/{name}").shuffle(mixed)
    return mixed


@cache
def _held_out_pairs(drawn: Compositions) -> dict[str, list[tuple[int, int]]]:
    total = drawn.names * (drawn.names - 1) // 2
    # Twice the pictures wanted: about a third of them then share their pair with another arrangement of it, so that
    # naming the two things is not enough to find the picture.
    size = max(1, min(int(HELD_OUT_PAIRS * total), 2 * drawn.held_out))
    places = Random(f"{drawn.seed}/pairs").sample(range(total), 2 * size)
    pairs = [_pair(place) for place in places]
    return {"validation": pairs[:size], "test": pairs[size:]}


@cache
def _forbidden_pairs(drawn: Compositions) -> frozenset[tuple[int, int]]:
    return frozenset(pair for pairs in _held_out_pairs(drawn).values() for pair in pairs)


def _pair(place: int) -> tuple[int, int]:
    """Pair number `place` in the order (0, 1), (0, 2), (1, 2), (0, 3), …"""
    larger = (1 + math.isqrt(1 + 8 * place)) // 2
    return place - larger * (larger - 1) // 2, larger
