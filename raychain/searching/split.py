"""A budget that the stages of a chain share by whole weights. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from raychain.planning.macs import Items, ModelSize, stage_macs
from raychain.schema.durations import Duration

Place = tuple[str, str]
"""The model before a stage, empty for the first of a chain, and the stage's own."""


@dataclass(frozen=True)
class SplitBudget:
    """Training MACs that every chain costs, whatever its stages get of them."""

    total: float
    weights: tuple[int, ...]
    sizes: Mapping[str, ModelSize]
    items: Items
    """Inputs of a sample."""
    samples: int
    """Samples of an epoch."""

    def stages(self, models: Sequence[str], weights: Sequence[int], *, follows: bool) -> list[tuple[str, Duration]]:
        """Models and their lengths; `follows`: grown ones have the model before as teacher."""
        teachers = ["", *(models[:-1] if follows else [""] * (len(models) - 1))]
        parts = zip(models, teachers, shares(weights), strict=True)
        return [(model, self._length(model, teacher, share)) for model, teacher, share in parts]

    def lengths(self, chains: Sequence[Sequence[str]], follows: Collection[bool]) -> dict[Place, tuple[Duration, ...]]:
        """Every length that a stage can have in one of the chains."""
        found: dict[Place, set[Duration]] = {}
        for count in {len(chain) for chain in chains}:
            places = {place for chain in chains if len(chain) == count for place in itertools.pairwise(("", *chain))}
            possible = possible_shares(self.weights, count)
            for (before, model), taught in itertools.product(places, follows):
                lengths = (self._length(model, before if taught else "", share) for share in possible)
                found.setdefault((before, model), set()).update(lengths)
        return {place: tuple(sorted(lengths, key=lambda length: length.amount)) for place, lengths in found.items()}

    def nearest(
        self, stages: Sequence[tuple[str, Duration]], *, follows: bool, samples: Callable[[Duration], int]
    ) -> tuple[int, ...]:
        """The weights that share the budget most as these stages share what they cost; `samples` of a length."""
        wanted = []
        for (before, _), (model, length) in itertools.pairwise([("", Duration(0, "steps")), *stages]):
            teacher = self.sizes.get(before) if follows else None
            wanted.append(max(1, stage_macs(self.sizes[model], teacher, samples(length), self.items)))
        return nearest_weights(wanted, self.weights)

    def _length(self, model: str, teacher: str, share: float) -> Duration:
        sample = stage_macs(self.sizes[model], self.sizes.get(teacher), 1, self.items)
        return Duration(float(f"{share * self.total / sample / self.samples:.9g}"), "epochs")


def shares(weights: Sequence[int]) -> tuple[float, ...]:
    """What each of the stages with these weights gets of the whole."""
    whole = sum(weights)
    return tuple(weight / whole for weight in weights)


def possible_shares(weights: Sequence[int], stages: int) -> tuple[float, ...]:
    """Every share that one of so many stages can get, smallest first."""
    others = {0}
    for _ in range(stages - 1):
        others = {total + weight for total in others for weight in weights}
    return tuple(sorted({weight / (weight + rest) for weight, rest in itertools.product(weights, others)}))


def nearest_weights(wanted: Sequence[float], weights: Sequence[int]) -> tuple[int, ...]:
    """The weights by which stages get as near as possible to what is wanted, by ratio; the smallest ones of a tie."""

    def missed(found: Sequence[int]) -> float:
        whole = sum(wanted)
        return sum(abs(math.log(share * whole / w)) for share, w in zip(shares(found), wanted, strict=True))

    def scaled(place: int, weight: int) -> tuple[int, ...]:
        """With this weight at this place, the others as near as they come to it."""
        unit = wanted[place] / weight
        return tuple(min(weights, key=lambda w: (abs(math.log(w * unit / amount)), w)) for amount in wanted)

    found = {scaled(place, weight) for place, weight in itertools.product(range(len(wanted)), weights)}
    return min(found, key=lambda weights: (round(missed(weights), 9), weights))
