"""The averaged weights follow the student as stated, and survive a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from growing import inputs, tiny
from torch import nn

from raychain.paradigms.clip.objective import ClipObjective
from raychain.paradigms.objective import Projector
from raychain.training.average import make_average
from raychain.training.optimizer import make_optimizer
from raychain.training.state import Counters, TrainState


def expected(values: list[float], steps: int, trained: bool) -> float:
    average = values[0]
    for n, value in enumerate(values[1:]):
        decay = 1 - 1 / steps
        average += (1 - (decay if trained else min(decay, (1 + n) / (10 + n)))) * (value - average)
    return average


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_the_average_is_the_stated_one(steps: int, trained: bool) -> None:
    model = nn.Linear(1, 1, bias=False).double()
    values = [float(v) for v in torch.randn(40, dtype=torch.float64)]
    model.weight.data.fill_(values[0])
    average = make_average(model, steps, trained=trained)
    assert average.module.weight.item() == values[0]
    for value in values[1:]:
        model.weight.data.fill_(value)
        average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(expected(values, steps, trained), rel=1e-12)
    assert not average.module.weight.requires_grad


def step(state: TrainState) -> None:
    images, tokens = inputs(state.student.model)
    image, text, scale = state.student.model(images, tokens)
    (scale * image @ text.T).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    assert state.average is not None
    state.average.update_parameters(state.student.model)
    state.counters.step += 1


def fresh() -> TrainState:
    student = ClipObjective(tiny(), Projector(dict.fromkeys(("image", "text"), (16, 8))))
    optimizer = make_optimizer(student, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    return TrainState(student, optimizer, Counters(), make_average(student.model, 20, trained=True))


def test_a_restored_state_goes_on_as_if_nothing_had_happened() -> None:
    state = fresh()
    for _ in range(5):
        step(state)
    saved = copy.deepcopy(state.snapshot({}))
    assert not all(
        torch.equal(a, b) for a, b in zip(state.model.parameters(), state.student.model.parameters(), strict=True)
    )
    other = fresh()
    other.restore(*saved)
    for _ in range(5):
        step(state)
        step(other)
    for a, b in ((state.model, other.model), (state.student, other.student)):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y), name
