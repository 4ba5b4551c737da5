"""A stage's metrics: measured by its worker group, or apart from it on resources that nothing else uses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import nn

from raychain.evaluators.measure import evaluate
from raychain.families.building import preprocessing_of
from raychain.families.tokenizing import make_tokenizer
from raychain.feed.cache import ShardCache
from raychain.training.task import ChainTask, StageTask

log = logging.getLogger("raychain.training")

APART_FROM = 10_000
"""Held-out pictures from which the next stage does not wait; fewer are measured while a process would start."""
POLL_S = 0.2


def measured(
    task: ChainTask, stage: StageTask, model: nn.Module, cache: ShardCache, device: torch.device
) -> dict[str, float]:
    """The metrics of the stage's model on what the chain is measured on; every rank of a process group calls it."""
    tokenize = make_tokenizer(stage.config)
    preprocessing = preprocessing_of(model)
    return evaluate(
        model,
        zero_shot=task.zero_shot,
        retrieval=task.retrieval,
        cache=cache,
        tokenize=tokenize,
        image_size=stage.size,
        mean=preprocessing["mean"],
        std=preprocessing["std"],
        tokenizer_id=tokenize.identity,
        device=device,
    )


def free_node(task: ChainTask) -> str | None:
    """A node that could hold this worker once more, if measuring takes long enough to be done there."""
    sets = [found for found in (task.zero_shot, task.retrieval) if found is not None]
    if sum(shard.samples for found in sets for shard in found.shards) < APART_FROM:
        return None
    from raychain.backend_ray import cluster  # a second of imports, which most runs need not

    return cluster.free_node(_resources())


def measured_apart(
    task: ChainTask, stage: StageTask, model: nn.Module, node: str, given_up: Callable[[], bool]
) -> dict[str, float] | None:
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
        metrics: dict[str, float] = ray.get(asked)
    except ray.exceptions.RayError as error:
        log.warning("%s will be measured again: %s", stage.model, str(error).strip().splitlines()[-1])
        return None
    return metrics


def _measure(task: ChainTask, stage: StageTask, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    torch.set_num_threads(task.threads)
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    model = task.paradigm.build(stage.config, size=stage.size, seed=0)
    model.load_state_dict(weights)
    preload = task.experiment.preload
    return measured(task, stage, model.to(device), ShardCache(preload.cache, preload.budget), device)


def _resources() -> dict[str, float]:
    found: dict[str, float] = ray.get_runtime_context().get_assigned_resources()
    return {name: found[name] for name in ("CPU", "GPU") if found.get(name)}
