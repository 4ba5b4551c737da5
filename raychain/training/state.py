"""TrainState: everything a stage needs to continue at its next step, and its two files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from raychain.training.student import Student


@dataclass
class Counters:
    """Real counts of the stage so far; saved with every checkpoint, never derived again."""

    step: int = 0
    samples: int = 0
    wall_s: float = 0.0
    data_wait_s: float = 0.0
    gap_s: float | None = None


@dataclass
class TrainState:
    """The student, its optimiser and the counters; the data position is `counters.step` global batches."""

    student: Student
    optimizer: torch.optim.Optimizer
    counters: Counters

    def snapshot(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
        """Copies on the CPU: weights by name, AdamW moments by `moment/name`, counters."""
        weights = {name: _copy(value) for name, value in self.student.state_dict().items()}
        moments = {
            f"{moment}/{name}": _copy(value)
            for name, parameter in self.student.named_parameters()
            for moment, value in self.optimizer.state.get(parameter, {}).items()
        }
        return weights, moments, asdict(self.counters)

    def restore(
        self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], counters: dict[str, Any]
    ) -> None:
        """The state a snapshot was taken of. Raises RuntimeError where names or shapes differ."""
        self.student.load_state_dict(weights)
        state: dict[Any, dict[str, torch.Tensor]] = {}
        for name, parameter in self.student.named_parameters():
            found = {key.partition("/")[0]: value for key, value in moments.items() if key.partition("/")[2] == name}
            if found:
                state[parameter] = {
                    moment: value.to(parameter.device) if value.ndim or self.optimizer.defaults["fused"] else value
                    for moment, value in found.items()
                }
        self.optimizer.state.clear()
        self.optimizer.state.update(state)
        self.counters = Counters(**counters)


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", copy=True).contiguous()
