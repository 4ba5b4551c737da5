"""`task: {paradigm: classify, …}`: the loss, and how pictures are changed before a model sees them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator

from raychain.core.json import Json
from raychain.paradigms.classify.augment import parse_augment
from raychain.paradigms.task import Task

Probability = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Rates = tuple[tuple[str, Rate], ...]


def _pairs(value: object) -> object:
    return tuple(sorted(value.items())) if isinstance(value, dict) else value


def _written(value: float | Rates) -> object:
    return dict(value) if isinstance(value, tuple) else value


RateOrRates = Annotated[Rate | Rates, BeforeValidator(_pairs), PlainSerializer(_written)]
"""A number, or a mapping from models' names to numbers."""


class ClassifyTask(Task):
    """`task: {paradigm: classify}`: pictures with a class each. Names and meanings are those of timm's `train.py`."""

    classes: int = Field(ge=2, le=1_000_000)
    """How many classes there are: the lines of `classnames.txt`. Labels (`.cls`) are 0 … classes - 1."""
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """bce: binary cross-entropy of each class, summed over classes (timm's `--bce-loss --bce-sum`)."""
    bce_threshold: Probability | None = None
    """Soft targets above it count as one and others as zero; only with `loss: bce`. 0 is DeiT III's."""
    smoothing: Rate = 0.0
    """Share of a target that is spread over all classes."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    augment: str | None = None
    """timm's RandAugment (`rand-m9-mstd0.5-inc1`), or `3a`, the 3-Augment of DeiT III: grey, solarised or blurred."""
    color_jitter: float = Field(0.0, ge=0, le=1)
    """Brightness, contrast and saturation are multiplied by numbers in 1 ± this; timm has none with RandAugment."""
    erase: Probability = 0.0
    """Probability that a rectangle becomes noise (random erasing, timm's `--reprob`, mode pixel)."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of mixup, in pairs of neighbours in the global batch; 0: none."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of CutMix, likewise. With both, each pair gets one of them, drawn with equal probability."""
    mix_probability: Probability = 1.0
    """Probability that a pair is mixed."""
    drop_path: RateOrRates = 0.0
    """Stochastic depth: the probability at which the last block's branches are left out, rising linearly from the first
    block; or {MODEL: probability}, 0 for models that are not in it."""

    @field_validator("augment")
    @classmethod
    def _known_augment(cls, text: str | None) -> str | None:
        if text is not None:
            parse_augment(text)
        return text

    @field_validator("bce_threshold")
    @classmethod
    def _of_bce(cls, threshold: float | None, info: object) -> float | None:
        if threshold is not None and getattr(info, "data", {}).get("loss") != "bce":
            raise ValueError("allowed is a threshold with `loss: bce` only")
        return threshold

    def drops(self, model: str) -> float:
        """`drop_path` of a model by name."""
        return dict(self.drop_path).get(model, 0.0) if isinstance(self.drop_path, tuple) else self.drop_path

    @property
    def identity(self) -> Json:
        """Without what models' configurations and the reader say: the rate of another stage changes no key."""
        return self.model_dump(mode="json", include={"paradigm", "classes", "loss", "bce_threshold", "smoothing"})
