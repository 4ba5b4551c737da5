"""Models that are made between two known ones, as a user asks for them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveInt

from raychain.schema.component import Component

SMALLEST_RATIO = 1.1
"""Expansion ratios below it are met by chance only: whole heads and layers come in larger steps."""


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


class Generate(Component):
    """Models between two known ones, by expansion ratio: each has so many times the parameters of the one before."""

    between: tuple[str, str]
    """Names of the smallest and the largest model, which differ in widths and depths alone."""
    ratios: Annotated[
        tuple[Annotated[float, Field(ge=SMALLEST_RATIO)], ...],
        BeforeValidator(_listed),
        Field(min_length=1),
    ]
    """Expansion ratios (parameters of the image tower). Each makes a ladder: ratio 3 makes models of 3, 9, 27 … times
    the smallest one's parameters, as long as the largest is more than half a rung away."""
    head_dim: PositiveInt | None = None
    """Width of an attention head, of which the image tower's widths are multiples. Heads grow whole, so it is that of
    the two models, and anything else is an error. Absent: theirs."""


Generates = Annotated[tuple[Generate, ...], BeforeValidator(_listed)]
"""One, or a list of them."""
