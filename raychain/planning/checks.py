"""The principles, of three, that a chain breaks, as sentences that say how to mend it. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from raychain.planning.cost import ChainCost
from raychain.planning.macs import ModelSize
from raychain.planning.principles import (
    RATIOS,
    expansion_ratio,
    fewest_last_epochs,
    ratio_excess,
    smallest_model,
    smallest_size,
)

FIRST_FACTOR = 2.0
"""A first model this many times too large or too small for the data is worth a warning."""
EPOCH_TOLERANCE = 0.95
"""Epochs are rounded; this much of the fewest published is still as published."""


def warnings(cost: ChainCost, samples: int, known: Sequence[ModelSize] = ()) -> list[str]:
    """Every principle that the chain breaks. `known` are models that could be added or used instead."""
    sizes = [stage.size for stage in cost.stages]
    if len(sizes) == 1 or any(stage.start for stage in cost.stages):
        return []
    if cost.stages[0].given:  # what it was trained on, and for how long, is not known
        return ratio_warnings(sizes, known)
    return [
        *first_warnings(sizes[0], samples, known),
        *ratio_warnings(sizes, known),
        *epoch_warnings(cost.epochs),
    ]


def first_warnings(first: ModelSize, samples: int, known: Sequence[ModelSize] = ()) -> list[str]:
    """Principle 1: the first model fits the data's size."""
    wanted, given = smallest_size(samples), first.principal_params
    factor = max(given / wanted, wanted / given)
    choice = _nearest(known, samples)
    if factor <= (FIRST_FACTOR if choice else 2 * FIRST_FACTOR) or (choice and choice.name == first.name):
        return []
    verdict = "large" if given > wanted else "small"
    fix = (
        f"begin with {choice.name} ({_millions(choice.principal_params)})" if choice else "begin with a model near that"
    )
    return [
        f"{first.name} ({_millions(given)} parameters in the image tower) is {verdict} to begin with on {samples:,} "
        f"samples, where the published chains suggest {_millions(wanted)}: {fix}"
    ]


def ratio_warnings(
    sizes: Sequence[ModelSize], known: Sequence[ModelSize] = (), bounds: tuple[float, float] = RATIOS
) -> list[str]:
    """Principle 2: every image tower has 2 to 4 times the parameters of the one before."""
    found, near = [], []
    for small, large in itertools.pairwise(sizes):
        ratio = expansion_ratio(small.principal_params, large.principal_params)
        if not ratio_excess(ratio, bounds):
            continue
        if ratio < bounds[0]:
            near.append(f"{small.name} → {large.name} ({ratio:.1f})")
        else:
            middle = _between(small, large, known)
            fix = f"put {middle.name} in between" if middle else "put a model in between"
            found.append(f"{small.name} → {large.name} expands {ratio:.1f} times, above {bounds[1]:g}: {fix}")
    if near:
        found.append(
            f"expansion ratios below {bounds[0]:g}: {', '.join(near)}. Leave a model out where you do not want it for "
            f"itself"
        )
    return found


def epoch_warnings(epochs: Sequence[float]) -> list[str]:
    """Principle 3: epochs fall along the chain, and the last model gets no fewer than a published one."""
    found = []
    for stage, (before, after) in enumerate(itertools.pairwise(epochs), 2):
        if after >= before:
            found.append(
                f"stage {stage} trains for {after:g} epochs after {before:g}: epochs should fall along the chain, "
                f"as each model starts from a better one; give it fewer, or the one before more"
            )
    fewest = fewest_last_epochs(epochs[0], len(epochs) - 1)
    if len(epochs) > 1 and epochs[-1] < EPOCH_TOLERANCE * fewest:
        found.append(
            f"the last stage's {epochs[-1]:g} epochs are fewer than any published chain of {len(epochs)} models has "
            f"({fewest:.3g} of {epochs[0]:g}): lossless accuracy is not known there"
        )
    return found


def _nearest(known: Sequence[ModelSize], samples: int) -> ModelSize | None:
    return known[smallest_model([size.principal_params for size in known], samples)] if known else None


def _between(small: ModelSize, large: ModelSize, known: Sequence[ModelSize]) -> ModelSize | None:
    """The model nearest to the geometric mean of the two, if there is one between them."""
    low, high = small.principal_params, large.principal_params
    inside = [size for size in known if low < size.principal_params < high]
    return min(inside, key=lambda size: abs(math.log(size.principal_params**2 / (low * high))), default=None)


def _millions(params: float) -> str:
    return f"{params / 1e6:.2g} M"
