"""What can be wrong with an experiment, said before any work starts. Without Ray."""

from __future__ import annotations

import json
from functools import lru_cache

import torch
from torch import nn

from raychain.backend_ray.address import cluster
from raychain.config.data import Data
from raychain.config.experiment import Experiment, Transfer
from raychain.core.storage import Folder
from raychain.data.health import DOTTED
from raychain.data.members import WAY_OUT
from raychain.data.reader import Reader
from raychain.errors import InputError, nearest
from raychain.evaluators.registry import check_takes
from raychain.growth import DEPTH_OPERATORS, WIDTH_OPERATORS, GrowthError, check
from raychain.paradigms import make_paradigm, model_size, usable_size
from raychain.paradigms.task import Task
from raychain.reporting.health import DataHealth
from raychain.reporting.trackers import check_trackers


def check_experiment(experiment: Experiment, address: str | None = None) -> None:
    """Everything that can be wrong without looking at data. Raises InputError."""
    check_chain(experiment)
    check_evaluators(experiment)
    check_compute(experiment, address)
    check_trackers(experiment.track)


def check_chain(experiment: Experiment) -> None:
    """Whether the models are usable, take the inputs' size, and grow into one another. Raises InputError."""
    for i, stage in enumerate(experiment.chain):
        usable_size(experiment.task, stage.model, experiment.stage_data(i).image_size, f"chain.{i}.model")
    if experiment.baseline and experiment.chain:
        last = input_size(experiment, len(experiment.chain) - 1)
        usable_size(experiment.task, experiment.baseline.model, last, "baseline.model")
    check_transfer(experiment.transfer)
    for i, stage in enumerate(experiment.chain):
        if i or stage.start:
            check_growth(experiment, i)


def check_transfer(transfer: Transfer) -> None:
    """Whether the operators exist, and there is something to shrink. Raises InputError."""
    for field, known in (("width", WIDTH_OPERATORS), ("depth", DEPTH_OPERATORS)):
        given = getattr(transfer, field)
        if given not in known:
            fix = nearest(given, list(known), "use one of these")
            raise InputError(f"transfer.{field}", given, ", ".join(known), fix)
        try:
            known[given]
        except ValueError as error:
            raise InputError(f"transfer.{field}", given, "an operator that can be imported", str(error)) from None
    _check_shrink(transfer)


def check_finishing(data: Data, reader: Reader, task: Task) -> None:
    """Whether the paradigm leaves to a GPU what `data.augment_on` says. Raises InputError."""
    if data.augment_on == "device" and data.crop and reader.identity.get("augment_on") != "device":
        allowed = f"host: paradigm {task.paradigm} finishes its pictures there"
        raise InputError("data.augment_on", "device", allowed, "leave data.augment_on out")


def check_evaluators(experiment: Experiment) -> None:
    """Whether the paradigm's models can be measured by the evaluators. Raises InputError."""
    check_takes(experiment.evaluate.named, make_paradigm(experiment.task).takes, "evaluate")


def _check_shrink(transfer: Transfer) -> None:
    """Grown moments belong to the function that shrinking loses; of `none` there is nothing to shrink."""
    if transfer.shrink == 1:
        return
    if transfer.optimizer == "grow":
        raise InputError("transfer.shrink", transfer.shrink, "1 with optimizer: grow", "use optimizer: reset")
    if transfer.width == "none":
        fix = "name another width operator, or leave shrink out: a random start is `shrink: 0` as well"
        raise InputError("transfer.shrink", transfer.shrink, "1 with width: none", fix)


def check_growth(experiment: Experiment, i: int) -> None:
    """Whether stage `i`, whose model is usable, can grow from the one before or its start. Raises InputError."""
    large, start = experiment.chain[i].model, experiment.chain[i].start
    small = start.model if start else experiment.chain[i - 1].model
    paradigm, size, transfer = make_paradigm(experiment.task), input_size(experiment, i), experiment.transfer
    if start:
        usable_size(experiment.task, small, size, f"chain.{i}.start.model")
    configs = [paradigm.config(name) for name in (small, large)]
    try:
        model_size(experiment.task, small, size)  # the teacher reads this stage's inputs
        own = size if start else input_size(experiment, i - 1)
        before = paradigm.adapt(_shapes(experiment.task, json.dumps(configs[0]), own), configs[0], size)
        models = [before, _shapes(experiment.task, json.dumps(configs[1]), size)]
    except ValueError as error:
        fix = f"{error} Or end the chain with another model"
        raise InputError(f"chain.{i}.model", f"{small} → {large}", f"models that take {size} pixels", fix) from None
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    if counts[1] < counts[0]:
        sizes = f"{small} ({counts[0]:,} parameters) → {large} ({counts[1]:,})"
        raise InputError(f"chain.{i}.model", sizes, "models in growing order", "order the chain from small to large")
    try:
        check(*models, width=transfer.width, depth=transfer.depth, describe=paradigm.describe)
    except GrowthError as error:
        allowed = f"a pair that {transfer.width} + {transfer.depth} can grow"
        raise InputError(f"chain.{i}.model", f"{small} → {large}", allowed, str(error)) from None


@lru_cache(maxsize=32)
def _shapes(task: Task, config: str, size: int) -> nn.Module:
    """A model without weights: a search asks for each of its models with many others."""
    return make_paradigm(task).build(json.loads(config), size=size, seed=0, device="meta")


def check_compute(experiment: Experiment, address: str | None) -> None:
    """Whether the workers get a sample each, GPUs where this machine is to have them, and a precision with GPUs.

    Raises InputError.
    """
    compute, batch = experiment.compute, experiment.train.global_batch
    fewest = experiment.fewest_workers
    if batch < experiment.most_workers:
        raise InputError(
            "train.global_batch",
            f"{batch} over {experiment.most_workers} workers",
            "at least one sample a worker",
            f"--set compute.workers={batch}, or raise train.global_batch",
        )
    joined, here = cluster(address), torch.cuda.device_count()
    if joined is None and compute.gpus_per_worker and here < fewest:
        raise InputError(
            "compute",
            f"{fewest} workers with {compute.gpus_per_worker:g} GPU each",
            f"at most the {here} GPUs of this machine, or a Ray cluster",
            "give --address ADDR of a running cluster, or --set compute.workers / compute.gpus_per_worker",
        )
    check_precision(experiment)


def check_precision(experiment: Experiment) -> None:
    """InputError where GPUs are asked for and no precision: it would be a machine that decides what is trained."""
    if experiment.compute.gpus_per_worker and experiment.train.precision is None:
        raise InputError("train.precision", "nothing, with compute.gpus_per_worker", "bf16 or fp32",
                         "--set train.precision=bf16, which is what earlier versions took on GPUs")  # fmt: skip


def writable(address: str, where: str = "--out") -> Folder:
    """The folder; InputError, which names `where` it was given, if nothing can be written there."""
    folder = Folder(address)
    try:
        folder.exists("")  # of storage that cannot be reached this takes the least time
        folder.write(".raychain", b"raychain writes here\n")
    except OSError as error:
        raise InputError(where, address, "a folder that can be written", str(error)) from None
    return folder


def check_health(health: DataHealth) -> None:
    """InputError if more of the training data is unusable than `data.max_bad_fraction` allows."""
    if health.exceeded:
        fix = "replace or leave out these shards, or raise data.max_bad_fraction (raychain data check lists everything)"
        if DOTTED in health.bad:
            fix = f"set {WAY_OUT}; else {fix}"
        raise InputError("data.train", health.describe(), f"at most {health.limit:.3g} of the samples", fix)


def input_size(experiment: Experiment, index: int) -> int:
    """Pixels a side of the pictures that stage `index` reads, or tokens of the texts."""
    paradigm = make_paradigm(experiment.task)
    given = experiment.stage_data(index).image_size
    return given or paradigm.native_size(paradigm.config(experiment.chain[index].model))
