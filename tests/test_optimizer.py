"""AdamW's groups are open_clip's; the learning rate is a function of the step alone."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from raychain.paradigms import make_paradigm
from raychain.paradigms.task import Task
from raychain.training.optimizer import learning_rate, make_optimizer, parameter_groups


class Small(nn.Module):
    """One parameter of each kind that a CLIP model has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.table = nn.Embedding(5, 3)
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))


def test_matrices_decay_and_gains_biases_and_logit_scale_do_not() -> None:
    model = Small()
    decayed, free = parameter_groups(model.named_parameters(), 0.1)
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert {id(p) for p in decayed["params"]} == {id(model.linear.weight), id(model.table.weight)}
    assert {id(p) for p in free["params"]} == {
        id(p) for p in (model.linear.bias, model.norm.weight, model.norm.bias, model.logit_scale)
    }


def test_the_optimizer_takes_the_recipe_and_leaves_frozen_parameters() -> None:
    model = Small()
    optimizer = make_optimizer(model, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-4)
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-4
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sum(p.sum() for p in model.parameters()).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name == "frozen")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("CoM-ViT-T-16", ((0.9, 0.98), 1e-6)),
        ("vit_small_patch16_224", ((0.9, 0.98), 1e-6)),
        ("CoM-Swin-T", ((0.9, 0.999), 1e-8)),
        ("RN50", ((0.9, 0.999), 1e-8)),
    ],
)
def test_adam_constants_follow_the_image_tower(model: str, expected: tuple[tuple[float, float], float]) -> None:
    paradigm = make_paradigm(Task())
    assert paradigm.adam(paradigm.config(model)) == expected


def rates(schedule: str, warmup: int = 10, total: int = 100) -> list[float]:
    return [learning_rate(s, peak=2.0, warmup=warmup, total=total, schedule=schedule) for s in range(total)]


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert rates("cosine")[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates("cosine")[10] == 2.0
    assert rates("constant")[10:] == [2.0] * 90


def test_wsd_is_constant_and_then_falls_as_one_minus_the_root() -> None:
    steps = [learning_rate(s, peak=2.0, warmup=10, total=100, schedule="wsd", cooldown=20) for s in range(100)]
    assert steps[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert steps[10:80] == [2.0] * 70
    assert steps[80:] == pytest.approx([2.0 * (1 - ((n + 1) / 21) ** 0.5) for n in range(20)])
    assert steps[-1] > 0


def test_cosine_falls_from_the_peak_to_near_zero() -> None:
    falling = rates("cosine")[10:]
    assert all(a > b for a, b in pairwise(falling))
    assert falling[45] == pytest.approx(1.0)
    assert 0 < falling[-1] < 2.0 * 1e-3


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (10, 10), (20, 10), (0, 1)])
def test_odd_lengths_give_usable_rates(warmup: int, total: int) -> None:
    assert all(0 < rate <= 2.0 for rate in rates("cosine", warmup, total))
