"""A linear classifier on frozen picture features. N pictures, C classes, D features, b pictures of a batch.

Two protocols, both deterministic, both on normalised features of pictures as open_clip's evaluation sees them:

- `ridge`: least squares on one-hot labels with an intercept, solved exactly. All it needs are sums over pictures in
  float64, so any number of ranks finds the same classifier up to rounding, and nothing is held but the features of a
  fifth of the training pictures. On those the penalty is chosen, from 1e-6 to 10 times the features' mean variance:
  the largest with the best top-1. Then all pictures are fitted. One pass, without steps or a learning rate.
- `clip_benchmark`: what clip_benchmark 1.6.2 does with its defaults and without a validation split: cross-entropy,
  AdamW without weight decay, 10 epochs of batches of 64, learning rate 0.1 on a cosine to zero, seed 0. It differs in
  two things: features are computed in fp32 (`--no_amp` there), and the seed also decides the order of the pictures,
  which there depends on what drew random numbers before. Every rank holds all features and fits.

Ridge is some points below logistic regression where classes are many and features few: compare models by one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from raychain.data.shards import Shard
from raychain.evaluators.data import LinearProbeData
from raychain.evaluators.encoding import Encoder
from raychain.evaluators.ranks import World

TOP = (1, 5)
HELD_OUT = 0.2
"""Share of the training pictures on which the penalty is chosen."""
PENALTIES = tuple(10 ** (exponent / 2) for exponent in range(-12, 3))
"""Penalties that are tried, in units of the features' mean variance."""
EPOCHS, BATCH, RATE, SEED = 10, 64, 0.1, 0
"""clip_benchmark's defaults."""


def linear_probe(encoder: Encoder, data: LinearProbeData) -> dict[str, float]:
    """{`top1`, `top5`, `mean_class`} in percent on the test pictures, the same on every rank.

    `mean_class` is the mean over classes of the share of their pictures that is found. With fewer than five classes
    every picture is among the first five. Raises OSError for a shard that cannot be read.
    """
    fit = _by_steps if data.protocol == "clip_benchmark" else _ridge
    weights_DC, bias_C = fit(encoder, data)
    hits_KC = torch.zeros((len(TOP), data.classes), dtype=torch.int64, device=encoder.device)
    counts_C = torch.zeros(data.classes, dtype=torch.int64, device=encoder.device)
    widest = min(max(TOP), data.classes)
    for features_bD, label_b, _ in _batches(encoder, data, data.test):
        scores_bC = features_bD.to(weights_DC.dtype) @ weights_DC + bias_C
        found = scores_bC.topk(widest).indices == label_b[:, None]
        for place, k in enumerate(TOP):
            hits_KC[place] += torch.bincount(label_b[found[:, :k].any(1)], minlength=data.classes)
        counts_C += torch.bincount(label_b, minlength=data.classes)
    joined = encoder.world.sum(torch.cat([hits_KC, counts_C[None]])).double().cpu()
    hits_KC, counts_C = joined[:-1], joined[-1]
    metrics = {f"top{k}": float(100 * hits.sum() / counts_C.sum()) for k, hits in zip(TOP, hits_KC, strict=True)}
    seen = counts_C > 0
    return metrics | {"mean_class": float(100 * (hits_KC[0][seen] / counts_C[seen]).mean())}


class Sums:
    """What least squares needs of pictures: sums over them, in float64."""

    def __init__(self, features: int, classes: int, device: torch.device) -> None:
        self.xx_DD = torch.zeros((features, features), dtype=torch.float64, device=device)
        self.xy_DC = torch.zeros((features, classes), dtype=torch.float64, device=device)
        self.x_D = torch.zeros(features, dtype=torch.float64, device=device)
        self.y_C = torch.zeros(classes, dtype=torch.float64, device=device)

    def add(self, x_bD: torch.Tensor, label_b: torch.Tensor) -> None:
        """Takes pictures in."""
        x_bD = x_bD.double()
        y_bC = F.one_hot(label_b, len(self.y_C)).double()
        self.xx_DD += x_bD.T @ x_bD
        self.xy_DC += x_bD.T @ y_bC
        self.x_D += x_bD.sum(0)
        self.y_C += y_bC.sum(0)

    def __add__(self, other: Sums) -> Sums:
        joined = Sums(len(self.x_D), len(self.y_C), self.x_D.device)
        for name, value in vars(joined).items():
            value += getattr(self, name) + getattr(other, name)
        return joined

    def over(self, world: World) -> Sums:
        """The sums over the pictures of all ranks."""
        joined = Sums(len(self.x_D), len(self.y_C), self.x_D.device)
        for name in vars(self):
            setattr(joined, name, world.sum(getattr(self, name)))
        return joined

    def solve(self, penalties: tuple[float, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Weights [D, C] and intercepts [C] for each penalty."""
        count = self.y_C.sum()
        mean_D, share_C = self.x_D / count, self.y_C / count
        covariance_DD = self.xx_DD / count - torch.outer(mean_D, mean_D)
        values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
        along_DC = vectors_DD.T @ (self.xy_DC / count - torch.outer(mean_D, share_C))
        scale = values_D.clamp_min(0).mean().clamp_min(torch.finfo(torch.float64).tiny)
        found = []
        for penalty in penalties:
            weights_DC = vectors_DD @ (along_DC / (values_D.clamp_min(0) + penalty * scale)[:, None])
            found.append((weights_DC, share_C - mean_D @ weights_DC))
        return found


def _ridge(encoder: Encoder, data: LinearProbeData) -> tuple[torch.Tensor, torch.Tensor]:
    fitted: Sums | None = None
    chosen: Sums | None = None
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for x_bD, label_b, held_b in _batches(encoder, data, data.train):
        if fitted is None or chosen is None:
            fitted, chosen = (Sums(x_bD.shape[1], data.classes, encoder.device) for _ in range(2))
        fitted.add(x_bD[~held_b], label_b[~held_b])
        chosen.add(x_bD[held_b], label_b[held_b])
        kept.append((x_bD[held_b], label_b[held_b]))
    features = encoder.world.most(fitted.x_D.numel() if fitted else 0)
    empty = Sums(features, data.classes, encoder.device)
    fitted, chosen = (sums.over(encoder.world) for sums in (fitted or empty, chosen or empty))
    penalty = PENALTIES[len(PENALTIES) // 2]
    if fitted.y_C.sum() > 0 and chosen.y_C.sum() > 0:
        hits = []
        for weights_DC, bias_C in fitted.solve(PENALTIES):
            right = [((x.double() @ weights_DC + bias_C).argmax(1) == label).sum() for x, label in kept]
            hits.append(sum(right, torch.zeros((), dtype=torch.int64, device=encoder.device)))
        found = encoder.world.total(torch.stack(hits))
        penalty = PENALTIES[max(i for i, hit in enumerate(found) if hit == max(found))]
    return (fitted + chosen).solve((penalty,))[0]


def _by_steps(encoder: Encoder, data: LinearProbeData) -> tuple[torch.Tensor, torch.Tensor]:
    """clip_benchmark's classifier; its random numbers are drawn in its order, from a generator of their own."""
    parts = [(x, label[:, None]) for x, label, _ in _batches(encoder, data, data.train)]
    x_ND = encoder.world.join([x for x, _ in parts], encoder.device)
    label_N = encoder.world.join([label for _, label in parts], encoder.device, torch.int64)[:, 0]
    order_N = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(SEED)).to(encoder.device)
    x_ND, label_N = x_ND[order_N], label_N[order_N]
    draws = torch.Generator().manual_seed(SEED)
    weights_CD, bias_C = torch.empty((data.classes, x_ND.shape[1])), torch.empty(data.classes)
    torch.nn.init.kaiming_uniform_(weights_CD, a=math.sqrt(5), generator=draws)
    bound = 1 / math.sqrt(x_ND.shape[1])
    bias_C.uniform_(-bound, bound, generator=draws)
    with torch.inference_mode(False), torch.enable_grad():
        x_ND, label_N = x_ND.clone(), label_N.clone()
        parameters = [value.to(encoder.device).clone().requires_grad_() for value in (weights_CD, bias_C)]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        steps, step = EPOCHS * math.ceil(len(x_ND) / BATCH), 0
        for _ in range(EPOCHS):
            _draw(draws)  # a loader's seed for its workers
            order = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(_draw(draws)))
            for batch in order.to(encoder.device).split(BATCH):
                for group in optimizer.param_groups:
                    group["lr"] = 0.5 * (1 + np.cos(np.pi * step / steps)) * RATE
                optimizer.zero_grad()
                F.cross_entropy(F.linear(x_ND[batch], *parameters), label_N[batch]).backward()
                optimizer.step()
                step += 1
    weights_CD, bias_C = (value.detach() for value in parameters)
    return weights_CD.T, bias_C


def _draw(generator: torch.Generator) -> int:
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator))


def _batches(
    encoder: Encoder, data: LinearProbeData, shards: Sequence[Shard]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """This rank's features [b, D] and labels [b], and which are held out to choose the penalty [b]."""
    for table, rows in encoder.tables(shards, data.wanted):
        # numbers of the whole shard, so that they do not depend on who reads which part of it
        held = np.random.default_rng(table.size).random(table.size) < HELD_OUT
        for batch in encoder.batches(rows):
            label_b = torch.tensor(table.label[batch.start : batch.stop], dtype=torch.int64, device=encoder.device)
            held_b = torch.from_numpy(held[batch.start : batch.stop].copy()).to(encoder.device)
            yield encoder.images(table, batch), label_b, held_b
