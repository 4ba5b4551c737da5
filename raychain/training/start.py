"""The state in which a stage's training starts: fresh, grown from the stage before, or restored."""

from __future__ import annotations

import torch
from torch import nn

from raychain.growth import grow, grow_moments, write_moments
from raychain.paradigms.objective import Objective
from raychain.training.average import make_average
from raychain.training.finished import Trained
from raychain.training.optimizer import make_optimizer
from raychain.training.state import Counters, TrainState
from raychain.training.states import Resumed
from raychain.training.task import ChainTask, StageTask


def start_stage(
    task: ChainTask,
    stage: StageTask,
    model: nn.Module,
    resumed: Resumed,
    previous: Trained | None,
    micro_batch: int | None,
) -> tuple[TrainState, Objective | None]:
    """The stage's state, on the device of its fresh `model`, and its teacher; the model is grown from `previous`, or
    restored.
    """
    transfer, recipe = task.experiment.transfer, task.experiment.train
    device = next(model.parameters()).device
    teacher, followed, describe = None, None, task.paradigm.describe
    before = task.before(stage)
    if previous and before:
        previous = previous.resized(task.paradigm, before.config, stage.size)
        operators = {"width": transfer.width, "depth": transfer.depth}
        grow(previous.model, model, **operators, shrink=transfer.shrink, describe=describe)
        if transfer.distill:
            teacher = task.paradigm.objective(previous.model, before.config).to(device)
            teacher, followed = teacher.eval().requires_grad_(False), before.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + stage.index)
        student = task.paradigm.objective(model, stage.config, followed).to(device)
    for tower in (student, teacher):
        if tower is not None:
            tower.micro_batch = micro_batch
    optimizer = make_optimizer(student, weight_decay=recipe.weight_decay, betas=stage.betas, eps=stage.eps)
    trained = previous is not None or stage.averaged_from > 0
    average = make_average(model, stage.average, trained=trained) if stage.average else None
    state = TrainState(student, optimizer, Counters(), average, stage.averaged_from)
    if resumed.step:
        resumed.states.load(resumed.step, state)
    elif previous and previous.moments and transfer.optimizer == "grow":
        grown = grow_moments(previous.model, model, previous.moments, **operators, describe=describe)
        write_moments(model, optimizer, grown)
    return state, teacher
