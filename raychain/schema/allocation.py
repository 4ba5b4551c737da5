"""How the planner may choose a chain from a family: epoch rules, expansion ratios and budget, as a user writes them."""

from __future__ import annotations

import re
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema

from raychain.schema.component import Component

_BUDGET = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([KMGTPEZ]?)(?:MACs)?\s*(%?)\s*")
_PREFIXES = {prefix: 1000.0**power for power, prefix in enumerate(["", *"KMGTPEZ"])}


class Budget(NamedTuple):
    """An upper bound of a chain's training MACs: a number of MACs, or a share of the baseline's."""

    amount: float
    unit: str
    """`MACs` or `%`."""

    def macs(self, baseline: int) -> float:
        """In MACs, where the baseline costs `baseline`."""
        return self.amount * baseline / 100 if self.unit == "%" else self.amount

    def __str__(self) -> str:
        return f"{self.amount:g} %" if self.unit == "%" else f"{self.amount:.4g} MACs"


def parse_budget(value: Any) -> Budget:
    """`"30 %"` of the baseline, `"9.5 EMACs"`, or a number of MACs. Raises ValueError for anything else."""
    found = None if isinstance(value, bool) else _BUDGET.fullmatch(str(value))
    amount = float(found[1]) * _PREFIXES[found[2]] if found else 0.0
    if not found or not 0 < amount < float("inf") or (found[2] and found[3]):
        raise ValueError('allowed is a share of the baseline such as "30 %", or MACs such as "9.5 EMACs" or 9.5e18')
    return Budget(amount, found[3] or "MACs")


def _falling(rule: tuple[float, float]) -> tuple[float, float]:
    if rule[0] <= rule[1]:
        raise ValueError("allowed is [epochs of the second model, fewer epochs of the last]: epochs fall along a chain")
    return rule


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError("allowed is [low, high]")
    return bounds


MacsBudget = Annotated[
    Budget, BeforeValidator(parse_budget), PlainSerializer(str, return_type=str), WithJsonSchema({"type": "string"})
]
_Positive = Annotated[float, Field(gt=0)]
EpochRule = Annotated[tuple[_Positive, _Positive], AfterValidator(_falling)]
RatioBounds = Annotated[tuple[_Positive, _Positive], AfterValidator(_ordered)]


class Allocation(Component):
    """How the planner chooses a chain from `family` (`raychain plan` shows what it chose and why)."""

    first: float | None = Field(None, gt=0)
    """Epochs of the first model, which is trained alone. Absent: 128 up to 2.9 million samples, falling to 64 at 15
    million, as published."""
    rules: Annotated[tuple[EpochRule, ...], Field(min_length=1)] | None = None
    """Epoch rules to try: [epochs of the second model, epochs of the last], linear in between. Absent: the published
    ones, one longer and one shorter, in proportion to `first`."""
    ratios: RatioBounds | None = None
    """Bounds that every expansion ratio must keep. Absent: [2, 4] where the family allows it, else as near as it
    comes."""
    budget: MacsBudget | None = None
    """Upper bound of the chain's training MACs: "30 %" of the baseline, "9.5 EMACs", or a number."""
    all_models: bool = False
    """true: every model of the family is wanted, so every chain has them all."""
