"""A chain's loss and gradients on any number of ranks, beside their definition in float64 in one process.

K captions, B pictures, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from raychain.config.experiment import Distill
from raychain.core.dist import mean_over_ranks, rank_slice
from raychain.paradigms.objective import Objective
from raychain.training.step import forward_backward

BATCH, CAPTIONS = 10, 3
Gradients = dict[str, torch.Tensor]
Pair = Callable[[torch.dtype], tuple[Any, Any]]
"""Makes a student and its teacher, objectives for pictures of 40 pixels and texts of 18 tokens."""
Task = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""The task's loss, by its definition, of a model and the features of a batch, [B, D] and [B, K, D]."""


def batch(part: slice) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (BATCH, 40, 40, 3), generator=rng, dtype=torch.uint8)
    return {"images": images[part], "tokens": torch.randint(1, 90, (BATCH, CAPTIONS, 18), generator=rng)[part]}


def reference(pair: Pair, task: Task) -> tuple[float, Gradients]:
    """Loss and gradients from the definitions, in float64, of the whole batch in one process, without raychain's
    losses.
    """
    student, teacher = pair(torch.float64)
    whole, encoded = batch(slice(None)), []
    for side in (student, teacher):
        pixels = (whole["images"].permute(0, 3, 1, 2).double() - side.mean) / side.std
        image = side.model.encode_image(pixels, normalize=True)
        encoded.append((image, torch.stack([side.model.encode_text(t, normalize=True) for t in whole["tokens"]])))
    (image, text), (image_t, text_t) = encoded
    loss = task(student.model, image, text)
    distance = ((image - image_t) ** 2).sum(-1).mean() / 2 + ((text - text_t) ** 2).sum(-1).mean() / 2
    alpha = min(2.0, 0.999 * loss.item() / distance.item())
    (loss + alpha * distance).backward()
    return (loss + alpha * distance).item(), _gradients(student)


def agree(pair: Pair, expected: tuple[float, Gradients], world: int, folder: Path) -> None:
    """Asserts that `world` ranks, with and without micro-batches, find the expected loss and gradients in float32."""
    rendezvous = str(folder / "rendezvous")
    torch.save(expected, f"{rendezvous}.expected")
    torch.multiprocessing.spawn(_compare, args=(world, rendezvous, pair), nprocs=world)


def _compare(rank: int, world: int, rendezvous: str, pair: Pair) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        loss, gradients = torch.load(f"{rendezvous}.expected")
        for micro in (None, 2):
            student, teacher = pair(torch.float32)
            student.micro_batch = teacher.micro_batch = micro
            wrapped = DistributedDataParallel(student) if world > 1 else student
            part = batch(rank_slice(BATCH, rank, world))
            losses = forward_backward(wrapped, student, teacher, part, Distill(), BATCH)
            assert float(mean_over_ranks(losses.total)) == pytest.approx(loss, rel=1e-6)
            found = _gradients(student)
            assert found.keys() == gradients.keys()
            largest = max(float(gradient.abs().max()) for gradient in gradients.values())
            for name, gradient in gradients.items():
                error = (found[name].double() - gradient).norm() / gradient.norm().clamp_min(1e-3 * largest)
                assert error < 1e-5, f"{name}: {error:.1e} at {world} workers, micro-batch {micro}"
    finally:
        dist.destroy_process_group()


def _gradients(student: Objective) -> Gradients:
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
