"""What an evaluator is: a component of `evaluate:` that finds its held-out data, and the task that measures a model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from raychain.evaluators.metrics import Metric
from raychain.schema.component import Component

if TYPE_CHECKING:
    from torch import nn

    from raychain.evaluators.context import Context
    from raychain.schema.captions import KeySplit


@dataclass(frozen=True)
class Setting:
    """What an experiment says once for all its data."""

    cache: Path
    """Folder for what was found out about the data."""
    captions: tuple[str, ...]
    """Members that hold captions, as `data.captions.keys` names them."""
    key_split: KeySplit = "first"
    """`data.key_split`."""
    classes: int | None = None
    """How many classes the models tell apart; None: they have no classes."""


class HeldOut(Protocol):
    """Held-out data that a model is measured on: frozen, picklable, and the same on every worker."""

    @property
    def digest(self) -> str:
        """Identity of all that determines the metrics but the model: content, options, never an address."""

    @property
    def samples(self) -> int:
        """How many samples a measurement reads."""

    def run(self, model: nn.Module, context: Context) -> dict[str, float]:
        """The evaluator's metrics by key. The model is in evaluation mode, gradients are off, precision is fp32.

        All ranks of `context.world` call it and return the same. Raises OSError for data that cannot be read.
        """


class Evaluator(Component):
    """Base of the components under `evaluate:`. A package of one's own registers its class as an entry point of the
    group `raychain.evaluators`; the entry point's name is the `type` that an experiment gives."""

    metrics: ClassVar[tuple[Metric, ...]]
    """What it measures. The first one is the chain's score if it is the first evaluator."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What a model must have: features of `pictures` and of `texts`, scores of `classes`."""

    type: str
    """Name of the evaluator."""

    @abstractmethod
    def resolve(self, where: str, setting: Setting) -> HeldOut:
        """Finds and checks the data. Raises InputError, which names `where`."""
