"""Top-1 and top-5 of a model that scores classes, on labelled pictures. C classes, b pictures of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from raychain.data.members import Wanted
from raychain.data.shards import Shard
from raychain.evaluators.data import check_labels, digest, identities, surveyed
from raychain.evaluators.encoding import Encoder
from raychain.evaluators.evaluator import Setting
from raychain.schema.captions import KeySplit

if TYPE_CHECKING:
    from torch import nn

    from raychain.evaluators.context import Context

TOP = (1, 5)


@dataclass(frozen=True)
class AccuracyData:
    """Labelled pictures of so many classes."""

    classes: int
    shards: tuple[Shard, ...]
    key_split: KeySplit = "first"

    @property
    def wanted(self) -> Wanted:
        """What a sample must hold."""
        return Wanted(label=True, key_split=self.key_split)

    @property
    def digest(self) -> str:
        """Identity of what is measured: the pictures' content; not where they lie."""
        return digest("accuracy", identities(self.shards), self.classes, self.key_split)

    @property
    def samples(self) -> int:
        """Pictures."""
        return sum(shard.samples for shard in self.shards)

    def run(self, model: nn.Module, context: Context) -> dict[str, float]:
        """See `accuracy`."""
        return accuracy(context.encoder(model), self)


def resolve_accuracy(patterns: Sequence[str], setting: Setting, where: str) -> AccuracyData:
    """The labelled pictures that the patterns name, for models of `setting.classes`.

    Raises InputError for patterns that match nothing, shards that are damaged or hold no labelled picture, and labels
    that the models do not have.
    """
    wanted = Wanted(label=True, key_split=setting.key_split)
    found = surveyed(patterns, wanted, setting.cache, where)
    allowed = f"0 … {setting.classes - 1}, the classes of the models" if setting.classes else "labels from 0 on"
    fix = "give pictures of these classes, or correct task.classes"
    classes = check_labels(found, wanted, setting.cache, where, setting.classes, allowed, fix)
    return AccuracyData(setting.classes or classes, found, setting.key_split)


def accuracy(encoder: Encoder, data: AccuracyData) -> dict[str, float]:
    """{`top1`, `top5`} in percent of all pictures, the same on every rank.

    With fewer than five classes every picture is among the first five. Raises OSError for a shard that cannot be read.
    """
    hits = torch.zeros(len(TOP), dtype=torch.int64, device=encoder.device)
    pictures = 0
    for table, rows in encoder.tables(data.shards, data.wanted):
        for batch in encoder.batches(rows):
            label = torch.tensor(table.label[batch.start : batch.stop], device=encoder.device)
            found = encoder.scores(table, batch).topk(min(max(TOP), data.classes)).indices == label[:, None]
            hits += torch.stack([found[:, :k].sum() for k in TOP])
            pictures += len(batch)
    *hit, count = encoder.world.total(torch.cat([hits, hits.new_tensor([pictures])]))
    return {f"top{k}": 100 * h / count for k, h in zip(TOP, hit, strict=True)}
