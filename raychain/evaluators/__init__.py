"""Evaluators: what measures a model on held-out data, by name under `evaluate:`. No Ray here.

A package of one's own gives an `Evaluator` (what a user writes) whose `resolve` returns a `HeldOut` (what measures),
and registers it as an entry point of the group `raychain.evaluators`.
"""

from raychain.evaluators.evaluator import Evaluator, HeldOut, Setting
from raychain.evaluators.metrics import Definition, Metric

__all__ = ["Definition", "Evaluator", "HeldOut", "Metric", "Setting"]
