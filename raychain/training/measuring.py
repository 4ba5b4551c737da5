"""A stage's metrics: measured by its worker group, or apart from it on resources that nothing else uses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import nn

from raychain.evaluators.context import Context
from raychain.evaluators.measure import measure
from raychain.evaluators.ranks import World
from raychain.evaluators.suite import Evaluation, Results
from raychain.families.building import preprocessing_of
from raychain.families.tokenizing import make_tokenizer
from raychain.feed.cache import ShardCache
from raychain.training.task import ChainTask, StageTask

log = logging.getLogger("raychain.training")

APART_FROM = 10_000
"""Held-out pictures from which the next stage does not wait; fewer are measured while a process would start."""
POLL_S = 0.2


def measured(
    stage: StageTask, model: nn.Module, evaluations: Iterable[Evaluation], cache: ShardCache, device: torch.device
) -> Results:
    """The stage's model on what it is to be measured on; every rank of a process group calls it."""
    tokenize = make_tokenizer(stage.config)
    preprocessing = preprocessing_of(model)
    context = Context(
        cache=cache,
        tokenize=tokenize,
        tokenizer_id=tokenize.identity,
        image_size=stage.size,
        mean=tuple(preprocessing["mean"]),
        std=tuple(preprocessing["std"]),
        device=device,
        world=World.group(),
    )
    return {found.digest: measure(model, found.held_out, context) for found in evaluations}


def free_node(task: ChainTask) -> str | None:
    """A node that could hold this worker once more, if measuring takes long enough to be done there."""
    if task.suite.samples < APART_FROM:
        return None
    from raychain.backend_ray import cluster  # a second of imports, which most runs need not

    return cluster.free_node(_resources())


def measured_apart(
    task: ChainTask, stage: StageTask, model: nn.Module, node: str, given_up: Callable[[], bool]
) -> Results | None:
    """`measured`, by a Ray task on `node` with this worker's resources; None if it was lost there, or `given_up`."""
    own = _resources()
    place = NodeAffinitySchedulingStrategy(node, soft=False, _fail_on_unavailable=True)
    work = ray.remote(_measure).options(
        num_cpus=own.get("CPU", 0), num_gpus=own.get("GPU", 0), max_retries=0, scheduling_strategy=place
    )
    asked = work.remote(task, stage, {name: value.detach().cpu() for name, value in model.state_dict().items()})
    try:
        while not ray.wait([asked], timeout=POLL_S)[0]:
            if given_up():
                ray.cancel(asked, force=True)
                return None
        results: Results = ray.get(asked)
    except ray.exceptions.RayError as error:
        log.warning("%s will be measured again: %s", stage.model, str(error).strip().splitlines()[-1])
        return None
    return results


def _measure(task: ChainTask, stage: StageTask, weights: Mapping[str, torch.Tensor]) -> Results:
    torch.set_num_threads(task.threads)
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    model = task.paradigm.build(stage.config, size=stage.size, seed=0)
    model.load_state_dict(weights)
    preload = task.experiment.preload
    cache = ShardCache(preload.cache, preload.budget)
    return measured(stage, model.to(device), task.suite.evaluations, cache, device)


def _resources() -> dict[str, float]:
    found: dict[str, float] = ray.get_runtime_context().get_assigned_resources()
    return {name: found[name] for name in ("CPU", "GPU") if found.get(name)}
