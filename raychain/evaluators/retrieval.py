"""Image-text retrieval: recall of captions by pictures and back. N pictures, M captions, D features, Q queries."""

from __future__ import annotations

import torch

from raychain.evaluators.data import RetrievalData
from raychain.evaluators.encoding import Encoder
from raychain.evaluators.ranks import World

TOP = (1, 5, 10)
SCORES = 1 << 22
"""Scores held at a time: 16 MiB."""


def retrieval(encoder: Encoder, data: RetrievalData) -> dict[str, float]:
    """{`i2t_r1`, `i2t_r5`, `i2t_r10`, `t2i_r1`, …} in percent over all pictures and captions, the same on every rank.

    Each rank encodes a part of the pictures with their captions. Raises OSError for a shard that cannot be read.
    """
    images: list[torch.Tensor] = []
    texts: list[torch.Tensor] = []
    pools: list[torch.Tensor] = []
    for table, rows in encoder.tables(data.shards, data.wanted):
        images += [encoder.images(table, batch) for batch in encoder.batches(rows)]
        if rows:
            offset = torch.tensor(table.caption_offset[rows.start : rows.stop + 1], dtype=torch.int64)
            texts.append(encoder.texts(table.tokens[int(offset[0]) : int(offset[-1])]))
            pools.append(offset.diff()[:, None].to(encoder.device))
    images_ND = encoder.world.join(images, encoder.device)
    texts_MD = encoder.world.join(texts, encoder.device)
    pool_N = encoder.world.join(pools, encoder.device, torch.int64)[:, 0]
    return recall(images_ND, texts_MD, pool_N, encoder.world)


def recall(
    images_ND: torch.Tensor,
    texts_MD: torch.Tensor,
    pool_N: torch.Tensor,
    world: World = World(),  # noqa: B008
) -> dict[str, float]:
    """The metrics of `retrieval` from features that all ranks hold; each rank scores a part of the queries.

    `pool_N` (int64) is how many captions each picture has; the captions stand in the order of their pictures. A picture
    is a hit at k if any of its captions is among the k nearest, a caption if its picture is: clip_benchmark's recall.
    Where there are no more than k candidates everything is a hit.
    """
    owner_M = torch.repeat_interleave(pool_N)
    picture_N = torch.arange(len(images_ND), device=images_ND.device)
    to_text = _hits(images_ND, texts_MD, picture_N, owner_M, world)
    to_image = _hits(texts_MD, images_ND, owner_M, picture_N, world)
    hits = world.total(torch.cat([to_text, to_image]))
    names = [f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in TOP]
    queries = [len(images_ND)] * len(TOP) + [len(texts_MD)] * len(TOP)
    return {name: 100 * hit / count for name, hit, count in zip(names, hits, queries, strict=True)}


def _hits(
    queries_QD: torch.Tensor,
    candidates_ND: torch.Tensor,
    picture_Q: torch.Tensor,
    picture_N: torch.Tensor,
    world: World,
) -> torch.Tensor:
    """How many of this rank's queries find a candidate of the same picture among the first k, int64 [len(TOP)]."""
    mine = world.part(len(queries_QD))
    step = max(1, min(mine.stop - mine.start, SCORES // len(candidates_ND)))
    scores = torch.empty((step, len(candidates_ND)), device=queries_QD.device)
    widest = min(max(TOP), len(candidates_ND))
    hits = torch.zeros(len(TOP), dtype=torch.int64, device=queries_QD.device)
    for start in range(mine.start, mine.stop, step):
        block = slice(start, min(start + step, mine.stop))
        torch.mm(queries_QD[block], candidates_ND.T, out=scores[: block.stop - block.start])
        nearest = scores[: block.stop - block.start].topk(widest).indices
        found = picture_N[nearest] == picture_Q[block, None]
        hits += torch.stack([found[:, :k].any(1).sum() for k in TOP])
    return hits
