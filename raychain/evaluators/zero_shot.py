"""Zero-shot classification with prompt ensembles. N pictures, C classes, T templates, D features, b of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from raychain.evaluators.data import MultilabelData, Prompted, ZeroShotData
from raychain.evaluators.encoding import Encoder

TOP = (1, 5)


def class_weights(encoder: Encoder, data: Prompted) -> torch.Tensor:
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


def zero_shot_multilabel(encoder: Encoder, data: MultilabelData) -> dict[str, float]:
    """{`map`}: the mean over all classes of the average precision, in percent, the same on every rank.

    Each rank ranks all pictures for a part of the classes. Raises OSError for a shard that cannot be read.
    """
    weights_DC = class_weights(encoder, data).T
    scores: list[torch.Tensor] = []
    shown: list[torch.Tensor] = []
    for table, rows in encoder.tables(data.shards, data.wanted):
        scores += [encoder.images(table, batch) @ weights_DC for batch in encoder.batches(rows)]
        shown += [torch.from_numpy(table.classes(rows)).to(encoder.device)] if rows else []
    mine = encoder.world.part(len(data.classes))
    scores_NC = encoder.world.join(scores, encoder.device)[:, mine]
    shown_NC = encoder.world.join(shown, encoder.device, torch.uint8)[:, mine]
    precision_C = encoder.world.join([average_precision(scores_NC, shown_NC)[:, None]], encoder.device, torch.float64)
    return {"map": 100 * float(precision_C.mean())}


def average_precision(scores_NC: torch.Tensor, shown_NC: torch.Tensor) -> torch.Tensor:
    """The average precision of each class, float64 [C]: over the pictures that show it, the mean share of such pictures
    among those that score at least as high. 0 for a class that no picture shows, as in clip_benchmark.
    """
    found_NC = shown_NC.gather(0, scores_NC.argsort(dim=0, descending=True, stable=True)).double()
    place_N1 = torch.arange(1, len(found_NC) + 1, dtype=torch.float64, device=found_NC.device)[:, None]
    return (found_NC.cumsum(0) / place_N1 * found_NC).sum(0) / found_NC.sum(0).clamp_min(1)
