"""The evaluators that come with raychain, as a user writes them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from raychain.config.captions import caption_key
from raychain.config.component import OneOrMore
from raychain.evaluators.evaluator import Evaluator, HeldOut, Setting
from raychain.evaluators.metrics import RETRIEVAL, ZERO_SHOT, Metric


class ZeroShot(Evaluator):
    """Zero-shot classification with prompt ensembles."""

    metrics: ClassVar[tuple[Metric, ...]] = ZERO_SHOT
    type: Literal["zero_shot"]
    data: str = Field(min_length=1)
    """Folder in clip_benchmark's webdataset layout: `classnames.txt`, `zeroshot_classification_templates.txt`,
    `test/*.tar`."""

    def resolve(self, where: str, setting: Setting) -> HeldOut:
        from raychain.evaluators.data import resolve_zero_shot

        return resolve_zero_shot(self.data, setting.cache, where, setting.key_split)


class Retrieval(Evaluator):
    """Retrieval of captions by pictures and of pictures by captions."""

    metrics: ClassVar[tuple[Metric, ...]] = RETRIEVAL
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
