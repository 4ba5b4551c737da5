"""The paper's three design principles, each a function with its evidence. Pure.

Source: Chain-of-Models Pre-Training, arXiv 2604.12391. Sizes are parameters of the image tower, as the paper counts
them (ViT-T 5.7 M, ViT-S 22 M): with these its chain T → S → B → L has ratios of 3.9, 3.9 and 3.5, its family of seven
1.7 to 2.3, which is what "2x to 4x" spans. (Whole models are dominated by the token table where they are small.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RATIOS = (2.0, 4.0)
"""Expansion ratios between neighbours. Evidence: within them larger steps make the family cheaper, and smaller ones
speed the largest model up more; outside of them the paper shows no chain but its family of seven (1.7 to 2.3)."""

RULES_OF_128 = ((24.0, 14.0), (24.0, 15.0), (24.0, 9.0), (32.0, 16.0), (16.0, 8.0))
"""Epochs of the second and of the last model where the first has 128. The first three are published (T → S → B → L,
S → B → L, the family of seven; numbers inferred from the published percentages); the others bracket them."""

SAMPLES, FIRST_EPOCHS, SMALLEST = (2.9e6, 15e6), (128.0, 64.0), (5.7e6, 22e6)
"""The two published points: CC3M's and the merged 15M's pairs, epochs of a model trained alone, and image tower's
parameters of the smallest model."""


def smallest_size(samples: int) -> float:
    """Principle 1: image-tower parameters of the smallest model for a data set of this many samples.

    Evidence: ViT-T (5.7 M) on CC3M's 2.9 million pairs, ViT-S (22 M) on 15 million. Two points, joined by a power law
    (size ∝ samples^0.82); far outside of them it is an extrapolation.
    """
    power = math.log(SMALLEST[1] / SMALLEST[0]) / math.log(SAMPLES[1] / SAMPLES[0])
    return SMALLEST[0] * (samples / SAMPLES[0]) ** power


def smallest_model(sizes: Sequence[int], samples: int) -> int:
    """Principle 1: index of the size nearest to `smallest_size(samples)` by ratio; the smaller one of a tie."""
    wanted = smallest_size(samples)
    return min(range(len(sizes)), key=lambda i: (abs(math.log(sizes[i] / wanted)), sizes[i]))


def expansion_ratio(small: int, large: int) -> float:
    """Principle 2: how many times as many image-tower parameters the larger neighbour has."""
    return large / small


def ratio_excess(ratio: float, bounds: tuple[float, float] = RATIOS) -> float:
    """Principle 2: how far a ratio, to one decimal, lies outside of its bounds, in octaves; 0 within."""
    (low, high), ratio = bounds, max(round(ratio, 1), 0.1)
    return max(0.0, math.log2(low / ratio), math.log2(ratio / high))


def linear_epochs(first: float, rule: tuple[float, float], grown: int) -> tuple[float, ...]:
    """Principle 3: epochs of the whole chain of `grown` models after the first, falling linearly over these.

    `rule` is (second model's, last model's) epochs; a single grown model gets the last's. Whole epochs from ten on,
    two digits below. Evidence: 128, 24, 19, 14 gives the published 27.6 % of ViT-L alone without loss of accuracy.
    """
    start, end = rule
    shares = [i / (grown - 1) for i in range(grown)] if grown > 1 else [1.0]
    return (first, *(_rounded(start + (end - start) * share) for share in shares))


def alone_epochs(samples: int) -> float:
    """Epochs of the first model, which is trained alone: as published, 128 for 2.9 million samples, 64 for 15 million.

    In between by a power law, outside of them the nearer of the two: nothing is known there.
    """
    power = math.log(FIRST_EPOCHS[1] / FIRST_EPOCHS[0]) / math.log(SAMPLES[1] / SAMPLES[0])
    within = min(max(samples, SAMPLES[0]), SAMPLES[1])
    return _rounded(FIRST_EPOCHS[0] * (within / SAMPLES[0]) ** power)


def default_rules(first: float) -> tuple[tuple[float, float], ...]:
    """`RULES_OF_128` for a first model of `first` epochs."""
    return tuple((start * first / 128, end * first / 128) for start, end in RULES_OF_128)


def fewest_last_epochs(first: float, grown: int) -> float:
    """Principle 3: the fewest epochs of the last model for which a lossless chain is published.

    Evidence: of `first`, 10 / 128 with three grown models (Swin; ViTs 14 / 128, or 6 / 64 on 15 million samples) and
    9 / 128 with six; in between linear. With one or two grown models 14 / 128 and 15 / 128 are the only ones.
    """
    known = {1: 14 / 128, 2: 15 / 128, 3: 10 / 128, 6: 9 / 128}
    if grown in known:
        return first * known[grown]
    share = (min(max(grown, 3), 6) - 3) / 3
    return first * (known[3] + share * (known[6] - known[3]))


def _rounded(epochs: float) -> float:
    return float(round(epochs)) if epochs >= 10 else float(f"{epochs:.2g}")
