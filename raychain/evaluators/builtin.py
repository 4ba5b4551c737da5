"""The evaluators that come with raychain, as a user writes them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from raychain.errors import InputError
from raychain.evaluators.evaluator import Evaluator, HeldOut, Setting
from raychain.evaluators.metrics import MULTILABEL, RETRIEVAL, ZERO_SHOT, Metric
from raychain.schema.captions import caption_key
from raychain.schema.component import OneOrMore


class ZeroShot(Evaluator):
    """Zero-shot classification with prompt ensembles."""

    metrics: ClassVar[tuple[Metric, ...]] = ZERO_SHOT
    needs: ClassVar[frozenset[str]] = frozenset({"pictures", "texts"})
    type: Literal["zero_shot"]
    data: str = Field(min_length=1)
    """Folder in clip_benchmark's webdataset layout: `classnames.txt`, `zeroshot_classification_templates.txt`,
    `test/*.tar`."""

    def resolve(self, where: str, setting: Setting) -> HeldOut:
        from raychain.evaluators.data import resolve_zero_shot

        return resolve_zero_shot(self.data, setting.cache, where, setting.key_split)


class ZeroShotMultilabel(Evaluator):
    """Zero-shot classification of pictures that show any number of classes, by mean average precision."""

    metrics: ClassVar[tuple[Metric, ...]] = MULTILABEL
    needs: ClassVar[frozenset[str]] = frozenset({"pictures", "texts"})
    type: Literal["zero_shot_multilabel"]
    data: str = Field(min_length=1)
    """The data of `zero_shot`, but with an `.npy` member for each picture instead of `.cls`: zeros, and a one for each
    class that it shows, in the order of `classnames.txt`."""

    def resolve(self, where: str, setting: Setting) -> HeldOut:
        from raychain.evaluators.data import resolve_multilabel

        return resolve_multilabel(self.data, setting.cache, where, setting.key_split)


class Retrieval(Evaluator):
    """Retrieval of captions by pictures and of pictures by captions."""

    metrics: ClassVar[tuple[Metric, ...]] = RETRIEVAL
    needs: ClassVar[frozenset[str]] = frozenset({"pictures", "texts"})
    type: Literal["retrieval"]
    data: OneOrMore
    """Shards of pictures with captions, or a folder in clip_benchmark's layout (`test/*.tar`)."""
    captions: OneOrMore | None = None
    """Members that hold the captions, as `data.captions.keys`, which is the default; clip_benchmark reads
    `txt|lines`."""

    @field_validator("captions")
    @classmethod
    def _known_forms(cls, keys: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for key in keys or ():
            caption_key(key)
        return keys

    def resolve(self, where: str, setting: Setting) -> HeldOut:
        from raychain.evaluators.data import resolve_retrieval
        from raychain.evaluators.finding import shards_of

        shards = [shards_of(address, where) for address in self.data]
        captions = self.captions or setting.captions
        return resolve_retrieval(shards, captions, setting.cache, where, setting.key_split)


class LinearProbe(Evaluator):
    """A linear classifier on the frozen features of pictures; see `raychain/evaluators/linear_probe.py`."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("top1", "linear top-1", "%", "high"),
        Metric("top5", "linear top-5", "%", "high", brief=False),
        Metric("mean_class", "linear mean of classes", "%", "high", brief=False),
    )
    needs: ClassVar[frozenset[str]] = frozenset({"pictures"})
    type: Literal["linear_probe"]
    data: OneOrMore
    """Shards of labelled pictures (`.cls`) for the test, or a folder with `test/*.tar` and `train/*.tar`."""
    train: OneOrMore | None = None
    """Shards of labelled pictures on which the classifier is fitted. Absent: `train/*.tar` of the folder `data`."""
    protocol: Literal["ridge", "clip_benchmark"] = "ridge"
    """Least squares with a penalty chosen on a fifth of the training pictures, or clip_benchmark's AdamW."""

    def resolve(self, where: str, setting: Setting) -> HeldOut:
        from raychain.core.storage import below
        from raychain.evaluators.data import resolve_linear_probe
        from raychain.evaluators.finding import shards_of

        test = [shards_of(address, where) for address in self.data]
        if self.train is None and test == list(self.data):
            allowed = f"a folder with test/*.tar and train/*.tar, or {where}.train beside it"
            raise InputError(where, ", ".join(self.data), allowed, f"add {where}.train: SHARDS")
        train = [shards_of(a, where, "train") for a in self.train or ()] or [below(a, "train") for a in self.data]
        return resolve_linear_probe(train, test, self.protocol, setting.cache, where, setting.key_split)


class Accuracy(Evaluator):
    """How often the class with the highest score is the picture's, of models with classes."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("top1", "top-1", "%", "high"),
        Metric("top5", "top-5", "%", "high", brief=False),
    )
    needs: ClassVar[frozenset[str]] = frozenset({"pictures", "classes"})
    type: Literal["accuracy"]
    data: OneOrMore
    """Shards of labelled pictures (`.cls`), or a folder with `test/*.tar`."""

    def resolve(self, where: str, setting: Setting) -> HeldOut:
        from raychain.evaluators.accuracy import resolve_accuracy
        from raychain.evaluators.finding import shards_of

        return resolve_accuracy([shards_of(address, where) for address in self.data], setting, where)


class Perplexity(Evaluator):
    """The loss of a language model on held-out text; see `raychain/evaluators/perplexity.py`."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("loss", "loss", "nats", "low"),
        Metric("perplexity", "perplexity", "", "low"),
        Metric("bits_per_byte", "bits per byte", "bits", "low"),
    )
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    type: Literal["perplexity"]
    data: OneOrMore
    """Files of text (`.txt`, `.jsonl`, `.parquet`, tar files) or of tokens (`.bin`)."""
    text: str = "text"
    """What the text is called in JSON lines and tables."""

    def resolve(self, where: str, setting: Setting) -> HeldOut:
        from raychain.evaluators.perplexity import resolve_perplexity

        return resolve_perplexity(self.data, self.text, setting.cache, where)
