"""An evaluator: the contrastive loss of held-out pictures and their first captions, all of them in one batch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from raychain.evaluators import Evaluator, Metric, Setting
from raychain.evaluators.context import Context
from raychain.evaluators.data import RetrievalData, resolve_retrieval


@dataclass(frozen=True)
class CaptionLossData:
    """What is measured; it goes to the workers as it is."""

    pairs: RetrievalData

    @property
    def digest(self) -> str:
        return f"caption-loss-1-{self.pairs.digest}"

    @property
    def samples(self) -> int:
        return self.pairs.samples

    def run(self, model: nn.Module, context: Context) -> dict[str, float]:
        encoder, images, texts = context.encoder(model), [], []
        for table, rows in encoder.tables(self.pairs.shards, self.pairs.wanted):
            first = table.caption_offset[rows.start : rows.stop]
            for batch in encoder.batches(rows):
                images.append(encoder.images(table, batch))
            if rows:
                texts.append(encoder.texts(table.tokens[first]))
        image_ND, text_ND = (context.world.join(parts, context.device) for parts in (images, texts))
        logits_NN = model.logit_scale.exp() * image_ND @ text_ND.T
        target_N = torch.arange(len(logits_NN), device=logits_NN.device)
        loss = (F.cross_entropy(logits_NN, target_N) + F.cross_entropy(logits_NN.T, target_N)) / 2
        return {"loss": float(loss)}


class CaptionLoss(Evaluator):
    """`evaluate: {NAME: {type: caption_loss, data: SHARDS}}`."""

    metrics: ClassVar[tuple[Metric, ...]] = (Metric("loss", "caption loss", "nats", "low"),)
    needs: ClassVar[frozenset[str]] = frozenset({"pictures", "texts"})
    type: Literal["caption_loss"]
    data: str

    def resolve(self, where: str, setting: Setting) -> CaptionLossData:
        pairs = resolve_retrieval([self.data], setting.captions, setting.cache, where, setting.key_split)
        return CaptionLossData(pairs)
