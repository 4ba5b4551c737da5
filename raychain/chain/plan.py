"""From an experiment to the task of the workers: checks, counts, step numbers and stage keys. Without Ray."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raychain.config.experiment import Baseline, Experiment
from raychain.demo import DemoError, is_current, make_demo
from raychain.errors import InputError, nearest
from raychain.evaluation.data import resolve_retrieval, resolve_zero_shot
from raychain.families import UnknownModelError, build, model_config, model_names, parameter_count
from raychain.feed.members import Wanted
from raychain.feed.order import Order
from raychain.feed.shards import Shard, expand, survey
from raychain.growth import DEPTH_OPERATORS, WIDTH_OPERATORS, GrowthError, check
from raychain.planning.macs import forward_macs, stage_macs
from raychain.reporting.health import DataHealth
from raychain.storage import Folder, is_local
from raychain.training.optimizer import adam_constants
from raychain.training.stage import STAGE_RECORD
from raychain.training.task import ChainTask, StageTask

SCHEMA = 1
"""Version of the code's training semantics; part of every stage key."""


def check_experiment(experiment: Experiment, address: str | None = None) -> None:
    """Everything that can be wrong without looking at data. Raises InputError."""
    for i, stage in enumerate(experiment.chain):
        try:
            model_config(stage.model)
            forward_macs(stage.model, experiment.data.image_size)
        except UnknownModelError as error:
            fix = nearest(
                stage.model, model_names(), "python -c 'import raychain.families as f; print(f.model_names())'"
            )
            raise InputError(f"chain.{i}.model", stage.model, str(error), fix) from None
        except ValueError as error:
            raise InputError(
                "data.image_size", experiment.data.image_size, f"a size {stage.model} takes", str(error)
            ) from None
    for field, known in (("width", WIDTH_OPERATORS), ("depth", DEPTH_OPERATORS)):
        given = getattr(experiment.transfer, field)
        if given not in known:
            fix = nearest(given, list(known), "use one of these")
            raise InputError(f"transfer.{field}", given, ", ".join(known), fix)
    for i in range(1, len(experiment.chain)):
        _check_growth(experiment, i)
    _check_compute(experiment, address)


def _check_growth(experiment: Experiment, i: int) -> None:
    small, large = experiment.chain[i - 1].model, experiment.chain[i].model
    if parameter_count(large) < parameter_count(small):
        sizes = f"{small} ({parameter_count(small):,} parameters) → {large} ({parameter_count(large):,})"
        raise InputError(f"chain.{i}.model", sizes, "models in growing order", "order the chain from small to large")
    size, transfer = experiment.data.image_size, experiment.transfer
    try:
        models = [build(name, seed=0, image_size=size, device="meta") for name in (small, large)]
        check(*models, width=transfer.width, depth=transfer.depth)
    except GrowthError as error:
        allowed = f"a pair that {transfer.width} + {transfer.depth} can grow"
        raise InputError(f"chain.{i}.model", f"{small} → {large}", allowed, str(error)) from None


def _check_compute(experiment: Experiment, address: str | None) -> None:
    compute, batch = experiment.compute, experiment.train.global_batch
    if batch % compute.workers:
        fits = [n for n in range(1, compute.workers + 1) if batch % n == 0]
        raise InputError(
            "train.global_batch",
            f"{batch} over {compute.workers} workers",
            "a global batch that the workers divide evenly",
            f"--set compute.workers={fits[-1]}, or change train.global_batch",
        )
    here = torch.cuda.device_count()
    if not (address or os.environ.get("RAY_ADDRESS")) and compute.gpus_per_worker and here < compute.workers:
        raise InputError(
            "compute",
            f"{compute.workers} workers with {compute.gpus_per_worker:g} GPU each",
            f"at most the {here} GPUs of this machine, or a Ray cluster",
            "give --address ADDR of a running cluster, or --set compute.workers / compute.gpus_per_worker",
        )


def writable(out: str) -> Folder:
    """The run folder; InputError if nothing can be written there."""
    folder = Folder(out)
    try:
        folder.write(".raychain", b"raychain run folder\n")
    except OSError as error:
        raise InputError("--out", out, "a folder that can be written", str(error)) from None
    return folder


def make_task(experiment: Experiment, out: str, *, on_progress: Callable[[int, int], None] | None = None) -> ChainTask:
    """Finds and counts the data, and resolves every stage. Renders the demo shards if the experiment asks for them."""
    cache = Path(experiment.preload.cache).expanduser()
    demo = experiment.data.demo
    if demo:
        try:
            make_demo(Path(demo.out), names=demo.names, pictures=demo.pictures, seed=demo.seed, on_progress=on_progress)
        except DemoError as error:
            raise InputError("data.demo", demo.out, "a folder for demo shards", str(error)) from None
    wanted = Wanted(experiment.data.captions.keys)
    try:
        (cache / "counts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("preload.cache", cache, "a folder that can be written", str(error)) from None
    shards = tuple(survey(expand(experiment.data.train, "data.train"), wanted, cache, "data.train"))
    check_health(DataHealth(shards, experiment.data.max_bad_fraction))
    evaluate = experiment.evaluate
    zero_shot = resolve_zero_shot(evaluate.zero_shot, cache) if evaluate.zero_shot else None
    keys = experiment.data.captions.keys
    retrieval = resolve_retrieval(evaluate.retrieval, keys, cache) if evaluate.retrieval else None
    order = Order(tuple(s.samples for s in shards), experiment.train.seed, experiment.data.shuffle_window)
    if experiment.train.global_batch > order.samples:
        raise InputError(
            "train.global_batch",
            experiment.train.global_batch,
            f"at most the {order.samples} samples of data.train",
            "lower it or add data",
        )
    measured = _digest([zero_shot.digest if zero_shot else None, retrieval.digest if retrieval else None])
    epoch_samples = experiment.data.samples or order.samples
    return ChainTask(
        experiment=experiment,
        out=Folder(out).path if is_local(out) else out,
        stages=_stages(experiment, shards, epoch_samples, Folder(out)),
        shards=shards,
        order=order,
        epoch_samples=epoch_samples,
        zero_shot=zero_shot,
        retrieval=retrieval,
        evaluation=measured,
        threads=max(1, int(worker_cpus(experiment))),
    )


def check_health(health: DataHealth) -> None:
    """InputError if more of the training data is unusable than `data.max_bad_fraction` allows."""
    if health.exceeded:
        fix = "replace or leave out these shards, or raise data.max_bad_fraction (raychain data check lists everything)"
        raise InputError("data.train", health.describe(), f"at most {health.limit:.3g} of the samples", fix)


def dry_plan(experiment: Experiment) -> dict[str, Any]:
    """What `--dry-run` shows: every stage's steps and MACs. Demo shards that are not there yet are not rendered."""
    demo, out = experiment.data.demo, f"{experiment.storage.rstrip('/')}/{experiment.name}"
    if demo and not is_current(Path(demo.out), names=demo.names, pictures=demo.pictures, seed=demo.seed):
        samples = experiment.data.samples or demo.pictures
        stages = _stages(experiment, (), samples, Folder(out))
    else:
        task = make_task(experiment, out)
        samples, stages = task.epoch_samples, task.stages
    shown = ("model", "params", "epochs", "steps", "warmup", "lr", "macs", "published")
    return {
        "epoch_samples": samples,
        "stages": [{name: getattr(stage, name) for name in shown} for stage in stages],
    }


def worker_cpus(experiment: Experiment) -> float:
    """CPUs of a worker: as configured, else this machine's cores shared out among the workers."""
    given = experiment.compute.cpus_per_worker
    return given if given is not None else max(1, (os.cpu_count() or 1) // experiment.compute.workers)


def _stages(
    experiment: Experiment, shards: tuple[Shard, ...], epoch_samples: int, out: Folder
) -> tuple[StageTask, ...]:
    recipe, stages, key = experiment.train, [], ""
    lengths = {"epoch_samples": epoch_samples, "global_batch": recipe.global_batch}
    every = experiment.evaluate.every
    data = {
        "shards": [s.identity for s in shards],
        "captions": experiment.data.captions.model_dump(mode="json"),
        "crop": experiment.data.crop,
        "window": experiment.data.shuffle_window,
    }
    for index, stage in enumerate(experiment.chain):
        steps = stage.epochs.steps(**lengths)
        if steps < 1:
            raise InputError(
                f"chain.{index}.epochs",
                stage.epochs,
                "at least one optimiser step",
                "lengthen it or lower global_batch",
            )
        grown = experiment.transfer if index else None
        warmup = (stage.warmup or (grown and grown.warmup) or recipe.warmup).steps(**lengths, stage_steps=steps)
        if warmup >= steps:
            raise InputError(
                f"chain.{index}", f"{warmup} warm-up steps of {steps}", "a warm-up shorter than the stage",
                f'set chain.{index}.warmup, for example "10 %"',
            )  # fmt: skip
        config = model_config(stage.model)
        image_size = experiment.data.image_size or int(config["vision_cfg"]["image_size"])
        lr = stage.lr or recipe.lr * (grown.lr_scale if grown else 1)
        betas, eps = adam_constants(recipe, config)
        precision = recipe.precision or ("bf16" if experiment.compute.gpus_per_worker else "fp32")
        key = _digest(
            {
                "schema": SCHEMA,
                "model": config,
                "image_size": image_size,
                "data": data,
                "steps": steps,
                "warmup": warmup,
                "lr": lr,
                "adam": [betas, eps],
                "precision": precision,
                "recipe": recipe.model_dump(
                    mode="json", include={"global_batch", "schedule", "weight_decay", "clip_norm"}
                ),
                "transfer": grown.model_dump(mode="json", exclude={"warmup", "lr_scale"}) if grown else None,
                "seed": recipe.seed + index,
                "previous": key,
            }
        )
        folder = f"{index}-{re.sub(r'[^A-Za-z0-9._-]', '_', stage.model)}"
        record = out.read_json(f"stages/{folder}/{STAGE_RECORD}")
        student = forward_macs(stage.model, image_size)
        teacher = experiment.chain[index - 1].model if grown and grown.distill else None
        stages.append(
            StageTask(
                index=index,
                model=stage.model,
                key=key,
                folder=folder,
                steps=steps,
                warmup=warmup,
                lr=lr,
                betas=betas,
                eps=eps,
                precision=precision,
                image_size=image_size,
                eval_every=max(1, every.steps(**lengths)) if every else 0,
                epochs=round(steps * recipe.global_batch / epoch_samples, 4),
                params=parameter_count(stage.model),
                macs=stage_macs(
                    student,
                    forward_macs(teacher, image_size) if teacher else None,
                    steps * recipe.global_batch,
                    experiment.data.captions.per_image,
                ),
                published=isinstance(record, dict) and record.get("key") == key,
            )
        )
    return tuple(stages)


def totals(task: ChainTask, wall_s: float) -> dict[str, Any]:
    """`totals` of run.json: the chain's MACs against the baseline's."""
    experiment = task.experiment
    lengths = {"epoch_samples": task.epoch_samples, "global_batch": experiment.train.global_batch}
    last = task.stages[-1]
    baseline = experiment.baseline or Baseline(model=last.model, epochs=experiment.chain[0].epochs)
    samples = baseline.epochs.steps(**lengths) * experiment.train.global_batch
    alone = stage_macs(forward_macs(baseline.model, last.image_size), None, samples, experiment.data.captions.per_image)
    macs = sum(stage.macs for stage in task.stages)
    return {
        "macs": macs,
        "baseline_macs": alone,
        "percent_of_baseline": round(100 * macs / alone, 2),
        "speedup": round(alone / macs, 3),
        "wall_s": round(wall_s, 3),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]
