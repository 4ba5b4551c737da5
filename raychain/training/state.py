"""TrainState: everything a stage needs to continue at its next step, and its two files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from raychain.paradigms.objective import Objective

ADAM = ("step", "exp_avg", "exp_avg_sq")
AVERAGE = "average"


@dataclass
class Counters:
    """Real counts of the stage so far; saved with every checkpoint, never derived again."""

    step: int = 0
    samples: int = 0
    wall_s: float = 0.0
    data_wait_s: float = 0.0
    gap_s: float | None = None
    """Seconds from the end of the stage before's last step to the beginning of the first step of this one."""
    first_step_s: float | None = None
    """Seconds of that first step, which sets up what later steps find (buffers, kernels)."""


def all_finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Whether every number in them is finite: one boolean on their device, which nothing waits for."""
    real = (tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel())
    # aminmax passes NaN on; on CPUs it takes a fiftieth of isfinite()'s time and a thirtieth of the maximum norm's
    extremes = [extreme for tensor in real for extreme in torch.aminmax(tensor)]
    return torch.stack(extremes).isfinite().all() if extremes else torch.tensor(True)


class Snapshot(NamedTuple):
    """A state on the CPU, as a checkpoint's files hold it."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    counters: Counters


@dataclass
class TrainState:
    """The student, its optimiser and the counters; the data position is `counters.step` global batches."""

    student: Objective
    optimizer: torch.optim.Optimizer
    counters: Counters
    average: AveragedModel | None = None
    averaged_from: int = 0
    """Step at which the average begins; until then there is none."""

    @property
    def averaged(self) -> AveragedModel | None:
        """The average, where it has begun."""
        return self.average if self.counters.step >= self.averaged_from else None

    @property
    def model(self) -> nn.Module:
        """What is measured and published: the averaged model, or the student's own."""
        return self.student.model if self.averaged is None else self.averaged.module

    def follow(self) -> None:
        """Takes the weights after an optimiser step into the average."""
        if self.averaged is None:
            return
        if self.averaged_from and self.counters.step == self.averaged_from:
            self.averaged.n_averaged.zero_()  # so that the weights are copied
        self.averaged.update_parameters(self.student.model)

    def finite(self) -> torch.Tensor:
        """Whether all numbers of its weights, moments and averaged weights are: one boolean on the device."""
        return all_finite(value for group in self._tensors() for value in group.values())

    def snapshot(self, buffers: dict[str, torch.Tensor]) -> Snapshot:
        """Copies on the CPU: weights by name, AdamW moments and averaged weights by `moment/name`, counters.

        `buffers` holds the copies of the last call and is used again; they are pinned where the state is on a GPU, to
        which copying is several times faster.
        """
        weights, moments = self._tensors()
        for name, value in [*weights.items(), *moments.items()]:
            if name not in buffers:
                buffers[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            buffers[name].copy_(value.detach(), non_blocking=True)
        if (device := next(self.student.parameters()).device).type == "cuda":
            torch.cuda.synchronize(device)
        copies, moment_copies = ({name: buffers[name] for name in group} for group in (weights, moments))
        return Snapshot(copies, moment_copies, replace(self.counters))

    def _tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Weights by name, and AdamW's moments and averaged weights by `moment/name`; on the device, not copied."""
        weights = dict(self.student.state_dict())
        moments = {
            f"{moment}/{name}": value
            for name, parameter in self.student.named_parameters()
            for moment, value in self.optimizer.state.get(parameter, {}).items()
        }
        if self.averaged is not None:
            moments |= {f"{AVERAGE}/{name}": value for name, value in self.averaged.module.state_dict().items()}
        return weights, moments

    def restore(self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], counters: Counters) -> None:
        """The state a snapshot was taken of. Raises RuntimeError where names or shapes differ."""
        self.student.load_state_dict(weights)
        state: dict[Any, dict[str, torch.Tensor]] = {}
        for name, parameter in self.student.named_parameters():
            found = {kind: moments[f"{kind}/{name}"] for kind in ADAM if f"{kind}/{name}" in moments}
            if found:
                state[parameter] = {
                    moment: value.to(parameter.device) if value.ndim or self.optimizer.defaults["fused"] else value
                    for moment, value in found.items()
                }
        self.optimizer.state.clear()
        self.optimizer.state.update(state)
        self.counters = counters
        if self.average is None:
            return
        averaged = {n.removeprefix(f"{AVERAGE}/"): v for n, v in moments.items() if n.startswith(f"{AVERAGE}/")}
        if averaged:
            self.average.module.load_state_dict(averaged)
            self.average.n_averaged.fill_(self.counters.step - self.averaged_from + 1)
        elif self.averaged is not None:  # a trunk's state, where the average begins
            self.average.n_averaged.zero_()
            self.average.update_parameters(self.student.model)
