"""One optimisation step's losses and gradients, for any number of ranks and any micro-batch. B is the global batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raychain.config.experiment import Distill
from raychain.core.dist import mean_over_ranks
from raychain.paradigms.objective import Columns, Encoded, Objective, split
from raychain.training.distillation import capped_alpha, feature_distance

Forward = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Losses:
    """This rank's part of a step's loss terms, detached; their mean over ranks is the global batch's."""

    task: torch.Tensor
    distill: torch.Tensor
    """alpha × distance; 0 without a teacher."""
    alpha: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """The sum, which is what the gradients are of."""
        return self.task + self.distill


def forward_backward(
    student: nn.Module,
    objective: Objective,
    teacher: Objective | None,
    batch: Columns,
    distill: Distill | None,
    global_batch: int,
    forward: Forward = contextlib.nullcontext,
) -> Losses:
    """Adds the gradients of L_task + alpha · L_IFD to the parameters of `objective` and returns the loss terms.

    `student` is what runs its forward pass: the objective itself, or what wraps it (DDP, torch.compile). `batch` is
    this rank's part of a global batch of B = `global_batch` samples; `forward` makes the context of the models' forward
    passes (autocast), while losses are computed in fp32 outside of it. alpha is lowered where the cap demands it
    (docs/method.md), which takes both losses of the whole global batch before any gradient. Without the cap a separable
    objective needs no pass that joins the samples, so its micro-batches are accumulated, each run once.
    """
    follows = teacher is not None and distill is not None and objective.projector is not None
    weight = distill if follows else None
    parts = split(batch, objective.micro_batch)
    if len(parts) == 1 or not objective.separable or (weight is not None and weight.cap):
        return _part(student, objective, teacher, batch, weight, global_batch, forward)
    done = []
    for i, part in enumerate(parts):
        more = i < len(parts) - 1  # DDP joins the ranks' gradients once, after the last part
        with student.no_sync() if more and isinstance(student, DistributedDataParallel) else contextlib.nullcontext():
            done.append(_part(student, objective, teacher, part, weight, global_batch, forward))
    return Losses(
        torch.stack([losses.task for losses in done]).sum(),
        torch.stack([losses.distill for losses in done]).sum(),
        done[0].alpha,
    )


def _part(
    student: nn.Module,
    objective: Objective,
    teacher: Objective | None,
    batch: Columns,
    distill: Distill | None,
    global_batch: int,
    forward: Forward,
) -> Losses:
    with forward():
        encoded: Encoded = student(batch)
    task = objective.loss(encoded.task, global_batch)
    none = torch.zeros((), device=task.device)
    if teacher is None or distill is None:
        if objective.projector is not None:  # DDP waits for every parameter's gradient, also of what has no part now
            task = task + 0 * sum(parameter.sum() for parameter in objective.projector.parameters())
        task.backward()
        return Losses(task.detach(), none, none)
    with forward():
        target = teacher.teach(batch)
    distance = feature_distance(encoded.features, target, global_batch)
    alpha = torch.full_like(none, distill.alpha)
    if distill.cap:
        shared = mean_over_ranks(torch.stack([distance, task]))
        alpha = capped_alpha(distill.alpha, shared[0], shared[1])
    (task + alpha * distance).backward()
    return Losses(task.detach(), (alpha * distance).detach(), alpha)
