"""The space as searchers see it: names and plain values, some of which a chain may not have. Pure."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from raychain.core.json import Json
from raychain.searching.space import CHAIN, Dimension, Params, Space


@dataclass(frozen=True)
class Choices:
    """Plain data, so that it can be pickled with a searcher: the chains, and the dimensions that each has."""

    chains: tuple[str, ...]
    of: dict[str, tuple[Dimension, ...]]

    @classmethod
    def of_space(cls, space: Space) -> Choices:
        """The choices of a search."""
        chains = tuple(str(chain) for chain in space.chain_dimension.choices)
        return cls(chains, {chain: tuple(space.dimensions(chain)) for chain in chains})

    @property
    def every(self) -> dict[str, Dimension]:
        """The dimensions of all chains by name."""
        return {dimension.name: dimension for dimensions in self.of.values() for dimension in dimensions}

    def encode(self, params: Params, *, whole: bool = False) -> Json:
        """Choices as searchers know them: places of ordered ones. `whole`: with the first choice of what the chain does
        not have, for searchers without conditional spaces."""
        dimensions = self.every.values() if whole else self.of[params[CHAIN]]
        found: Json = {CHAIN: params[CHAIN]}
        for dimension in dimensions:
            value = params.get(dimension.name, dimension.choices[0])
            found[dimension.name] = dimension.choices.index(value) if dimension.ordered else value
        return found

    def decode(self, values: Json) -> Params | None:
        """The choices of a suggestion, without what its chain does not have; None where they are none of the space."""
        chain = values.get(CHAIN)
        if chain not in self.of:
            return None
        found: Params = {CHAIN: chain}
        for name, choices, ordered in self.of[chain]:
            value = values.get(name)
            if ordered:
                if not isinstance(value, int | float) or not 0 <= (place := round(value)) < len(choices):
                    return None
                value = choices[place]
            if value not in choices:
                return None
            found[name] = value
        return found

    def points(self) -> Iterator[Params]:
        """Every combination."""
        for chain, dimensions in self.of.items():
            for choices in itertools.product(*(dimension.choices for dimension in dimensions)):
                yield {CHAIN: chain} | dict(zip((d.name for d in dimensions), choices, strict=True))

    def drawn(self, draw: random.Random) -> Params:
        """A random combination."""
        chain = draw.choice(self.chains)
        return {CHAIN: chain} | {dimension.name: draw.choice(dimension.choices) for dimension in self.of[chain]}
