"""The measurement of one model: every rank of the process group calls it and gets all metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from raychain.evaluators.data import RetrievalData, ZeroShotData
from raychain.evaluators.encoding import Encoder
from raychain.evaluators.retrieval import retrieval as measure_retrieval
from raychain.evaluators.zero_shot import zero_shot as measure_zero_shot
from raychain.feed.cache import ShardCache
from raychain.feed.spec import Resizing, Tokenize


def evaluate(
    model: nn.Module,
    *,
    zero_shot: ZeroShotData | None,
    retrieval: RetrievalData | None,
    cache: ShardCache,
    tokenize: Tokenize,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    tokenizer_id: str,
    device: torch.device | str,
    batch_size: int = 256,
    resizing: Resizing = Resizing(),  # noqa: B008 - frozen
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """`zero_shot_top1`, `zero_shot_top5`, `i2t_r1` … `t2i_r10` in percent (0 … 100) of an open_clip model on `device`.

    All ranks call it with the same arguments, their own `device`, and a cache on their node. Work and reading are
    divided, and all get the same numbers, however many they are. Tasks that are None are left out. In fp32 without
    autocast; pictures as open_clip's evaluation sees them, `image_size` pixels a side (`resizing` says how they get
    there), normalised by `mean` and `std`; `tokenize` gives token ids [n, L], and `tokenizer_id` names it in the cache.
    `progress` hears how many pictures this rank has read for a task. The mode of each module (training or
    evaluation) is afterwards what it was.

    Raises OSError for a shard that cannot be read.
    """
    device = torch.device(device)
    metrics: dict[str, float] = {}
    with _measuring(model, device):
        encoder = Encoder(
            model,
            cache,
            tokenize,
            tokenizer_id=tokenizer_id,
            image_size=image_size,
            mean=mean,
            std=std,
            device=device,
            batch_size=batch_size,
            resizing=resizing,
            progress=progress,
        )
        if zero_shot is not None:
            metrics |= measure_zero_shot(encoder, zero_shot)
        if retrieval is not None:
            metrics |= measure_retrieval(encoder, retrieval)
    return metrics


@contextlib.contextmanager
def _measuring(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradients, full fp32; afterwards every module's mode and the precision are what they were."""
    training = [module for module in model.modules() if module.training]
    precision = torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for module in training:
            module.training = True
