"""Zero-shot classification with prompt ensembles. C classes, T templates, D features, b pictures of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from raychain.evaluators.data import ZeroShotData
from raychain.evaluators.encoding import Encoder

TOP = (1, 5)


def class_weights(encoder: Encoder, data: ZeroShotData) -> torch.Tensor:
    """[C, D]: the normalised mean of each class's normalised prompt features, as in open_clip and clip_benchmark.

    Each rank encodes a part of the classes; all have the result.
    """
    mine = data.classes[encoder.world.part(len(data.classes))]
    step, parts = max(1, encoder.batch_size // len(data.templates)), []
    for start in range(0, len(mine), step):
        names = mine[start : start + step]
        prompts = [prompt for name in names for prompt in data.prompts(name)]
        features_CTD = encoder.texts(encoder.tokenize(prompts)).unflatten(0, (len(names), -1))
        parts.append(F.normalize(features_CTD.mean(1), dim=-1))
    return encoder.world.join(parts, encoder.device)


def zero_shot(encoder: Encoder, data: ZeroShotData) -> dict[str, float]:
    """{`top1`, `top5`} in percent of all pictures, the same on every rank.

    With fewer than five classes every picture is among the first five. Raises OSError for a shard that cannot be read.
    """
    weights_DC = class_weights(encoder, data).T
    widest = min(max(TOP), len(data.classes))
    scores = torch.empty((encoder.batch_size, len(data.classes)), device=encoder.device)
    hits = torch.zeros(len(TOP), dtype=torch.int64, device=encoder.device)
    pictures = 0
    for table, rows in encoder.tables(data.shards, data.wanted):
        for batch in encoder.batches(rows):
            scores_bC = torch.mm(encoder.images(table, batch), weights_DC, out=scores[: len(batch)])
            label = torch.tensor(table.label[batch.start : batch.stop], device=encoder.device)
            found = scores_bC.topk(widest).indices == label[:, None]
            hits += torch.stack([found[:, :k].sum() for k in TOP])
            pictures += len(batch)
    *hit, count = encoder.world.total(torch.cat([hits, hits.new_tensor([pictures])]))
    return {f"top{k}": 100 * h / count for k, h in zip(TOP, hit, strict=True)}
