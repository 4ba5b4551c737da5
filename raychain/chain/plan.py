"""From an experiment to the task of the workers: checks, counts, step numbers and stage keys. Without Ray."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from raychain.config.durations import Duration
from raychain.config.experiment import Baseline, Data, Experiment, Train, Transfer
from raychain.demo import DemoError, is_current, make_demo
from raychain.errors import InputError, nearest
from raychain.evaluation.data import resolve_retrieval, resolve_zero_shot
from raychain.families import UnknownModelError, build, model_config, model_names, parameter_count
from raychain.families.tokenizing import make_tokenizer
from raychain.feed.loader import Feed
from raychain.feed.members import Wanted
from raychain.feed.order import Mixture, Order, Stream
from raychain.feed.shards import Shard, expand, survey
from raychain.feed.spec import Spec, fitting
from raychain.growth import DEPTH_OPERATORS, WIDTH_OPERATORS, GrowthError, check
from raychain.planning.macs import forward_macs, stage_macs
from raychain.reporting.health import DataHealth
from raychain.reporting.trackers import check_trackers
from raychain.storage import Folder, below, is_local
from raychain.training.optimizer import adam_constants
from raychain.training.stage import STAGE_RECORD
from raychain.training.task import ChainTask, StageTask

SCHEMA = 2
"""Version of the code's training semantics; part of every stage key."""


class Others(NamedTuple):
    """Lengths that first and grown stages have in other chains."""

    first: tuple[Duration, ...] = ()
    grown: tuple[Duration, ...] = ()


ALONE = Others()
"""A chain that is trained for itself."""


def check_experiment(experiment: Experiment, address: str | None = None) -> None:
    """Everything that can be wrong without looking at data. Raises InputError."""
    check_chain(experiment)
    check_compute(experiment, address)
    check_trackers(experiment.track)


def check_chain(experiment: Experiment) -> None:
    """Whether the models are known, take the pictures' size, and grow into one another. Raises InputError."""
    for i, stage in enumerate(experiment.chain):
        image_size = experiment.stage_data(i).image_size
        try:
            model_config(stage.model)
            forward_macs(stage.model, image_size)
        except UnknownModelError as error:
            fix = nearest(
                stage.model, model_names(), "python -c 'import raychain.families as f; print(f.model_names())'"
            )
            raise InputError(f"chain.{i}.model", stage.model, str(error), fix) from None
        except ValueError as error:
            raise InputError("data.image_size", image_size, f"a size {stage.model} takes", str(error)) from None
    for field, known in (("width", WIDTH_OPERATORS), ("depth", DEPTH_OPERATORS)):
        given = getattr(experiment.transfer, field)
        if given not in known:
            fix = nearest(given, list(known), "use one of these")
            raise InputError(f"transfer.{field}", given, ", ".join(known), fix)
    _check_shrink(experiment.transfer)
    for i in range(1, len(experiment.chain)):
        _check_growth(experiment, i)


def _check_shrink(transfer: Transfer) -> None:
    """Grown moments belong to the function that shrinking loses; of `none` there is nothing to shrink."""
    if transfer.shrink == 1:
        return
    if transfer.optimizer == "grow":
        raise InputError("transfer.shrink", transfer.shrink, "1 with optimizer: grow", "use optimizer: reset")
    if transfer.width == "none":
        fix = "name another width operator, or leave shrink out: a random start is `shrink: 0` as well"
        raise InputError("transfer.shrink", transfer.shrink, "1 with width: none", fix)


def _check_growth(experiment: Experiment, i: int) -> None:
    small, large = experiment.chain[i - 1].model, experiment.chain[i].model
    if parameter_count(large) < parameter_count(small):
        sizes = f"{small} ({parameter_count(small):,} parameters) → {large} ({parameter_count(large):,})"
        raise InputError(f"chain.{i}.model", sizes, "models in growing order", "order the chain from small to large")
    size, transfer = _image_size(experiment, i), experiment.transfer
    try:
        models = [build(name, seed=0, image_size=size, device="meta") for name in (small, large)]
        check(*models, width=transfer.width, depth=transfer.depth)
    except GrowthError as error:
        allowed = f"a pair that {transfer.width} + {transfer.depth} can grow"
        raise InputError(f"chain.{i}.model", f"{small} → {large}", allowed, str(error)) from None
    except ValueError as error:
        fix = f"{error} Or end the chain with another model"
        raise InputError(f"chain.{i}.model", f"{small} → {large}", f"models that take {size} pixels", fix) from None


def check_compute(experiment: Experiment, address: str | None) -> None:
    """Whether the workers get a pair each, and GPUs where this machine is to have them. Raises InputError."""
    compute, batch = experiment.compute, experiment.train.global_batch
    fewest = experiment.fewest_workers
    if batch < experiment.most_workers:
        raise InputError(
            "train.global_batch",
            f"{batch} over {experiment.most_workers} workers",
            "at least one pair a worker",
            f"--set compute.workers={batch}, or raise train.global_batch",
        )
    here = torch.cuda.device_count()
    if not (address or os.environ.get("RAY_ADDRESS")) and compute.gpus_per_worker and here < fewest:
        raise InputError(
            "compute",
            f"{fewest} workers with {compute.gpus_per_worker:g} GPU each",
            f"at most the {here} GPUs of this machine, or a Ray cluster",
            "give --address ADDR of a running cluster, or --set compute.workers / compute.gpus_per_worker",
        )


def writable(address: str, where: str = "--out") -> Folder:
    """The folder; InputError, which names `where` it was given, if nothing can be written there."""
    folder = Folder(address)
    try:
        folder.write(".raychain", b"raychain writes here\n")
    except OSError as error:
        raise InputError(where, address, "a folder that can be written", str(error)) from None
    return folder


def make_task(
    experiment: Experiment,
    out: str,
    *,
    store: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ChainTask:
    """Finds and counts the data, and resolves every stage. Renders the demo shards if the experiment asks for them.

    `store` is the storage whose finished stages are shared.
    """
    cache = Path(experiment.preload.cache).expanduser()
    demo = experiment.data.demo
    if demo:
        try:
            make_demo(Path(demo.out), names=demo.names, pictures=demo.pictures, seed=demo.seed, on_progress=on_progress)
        except DemoError as error:
            raise InputError("data.demo", demo.out, "a folder for demo shards", str(error)) from None
    try:
        (cache / "counts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("preload.cache", cache, "a folder that can be written", str(error)) from None
    evaluate, keys = experiment.evaluate, experiment.data.captions.keys
    zero_shot = resolve_zero_shot(evaluate.zero_shot, cache) if evaluate.zero_shot else None
    retrieval = resolve_retrieval(evaluate.retrieval, keys, cache) if evaluate.retrieval else None
    task = ChainTask(
        experiment=experiment,
        out=Folder(out).path if is_local(out) else out,
        store=store,
        stages=_stages(experiment, _readings(experiment, cache), Folder(out)),
        zero_shot=zero_shot,
        retrieval=retrieval,
        evaluation=_digest([zero_shot.digest if zero_shot else None, retrieval.digest if retrieval else None]),
        threads=max(1, int(worker_cpus(experiment))),
    )
    check_health(DataHealth(task.shards, experiment.data.max_bad_fraction))
    return task


def replan(task: ChainTask, experiment: Experiment, out: str, others: Others = ALONE) -> ChainTask:
    """The task of another chain on the same data and evaluation, which are not looked at again. Raises InputError.

    `others` are the lengths with which the chain's trunks are to be shared.
    """
    feed = task.stages[0].feed
    readings = [Reading(feed.shards, feed.order)] * len(experiment.chain)
    stages = _stages(experiment, readings, Folder(out), others)
    return replace(task, experiment=experiment, out=Folder(out).path if is_local(out) else out, stages=stages)


def check_health(health: DataHealth) -> None:
    """InputError if more of the training data is unusable than `data.max_bad_fraction` allows."""
    if health.exceeded:
        fix = "replace or leave out these shards, or raise data.max_bad_fraction (raychain data check lists everything)"
        raise InputError("data.train", health.describe(), f"at most {health.limit:.3g} of the samples", fix)


def dry_plan(experiment: Experiment) -> dict[str, Any]:
    """What `--dry-run` shows: every stage's steps and MACs. Demo shards that are not there yet are not rendered."""
    demo, out = experiment.data.demo, below(experiment.storage, experiment.name)
    if demo and not is_current(Path(demo.out), names=demo.names, pictures=demo.pictures, seed=demo.seed):
        reading = Reading((), Order((demo.pictures,), experiment.train.seed))
        stages = _stages(experiment, [reading] * len(experiment.chain), Folder(out))
    else:
        stages = make_task(experiment, out).stages
    shown = ("model", "params", "epoch_samples", "epochs", "steps", "warmup", "lr", "macs", "published")
    return {"stages": [{name: getattr(stage, name) for name in shown} for stage in stages]}


def epoch_samples(experiment: Experiment, data: Data, where: str = "data.train") -> int:
    """Samples of an epoch of `data`: as stated, as the demo will render them, or counted. Raises InputError."""
    demo = experiment.data.demo
    if data.samples:
        return data.samples
    if demo and not is_current(Path(demo.out), names=demo.names, pictures=demo.pictures, seed=demo.seed):
        return demo.pictures
    cache = Path(experiment.preload.cache).expanduser()
    (cache / "counts").mkdir(parents=True, exist_ok=True)
    return _reading(experiment, data, cache, where).order.samples


class Reading(NamedTuple):
    """The shards of a stage and the order of their samples."""

    shards: tuple[Shard, ...]
    order: Stream


def _readings(experiment: Experiment, cache: Path) -> list[Reading]:
    """Each stage's data, found and counted once where stages share it. Raises InputError."""
    known: dict[Data, Reading] = {}
    readings = []
    for index in range(len(experiment.chain)):
        data = experiment.stage_data(index)
        if data not in known:
            own = "train" in experiment.chain[index].data.model_fields_set
            known[data] = _reading(experiment, data, cache, f"chain.{index}.data.train" if own else "data.train")
        readings.append(known[data])
    return readings


def _reading(experiment: Experiment, data: Data, cache: Path, where: str) -> Reading:
    wanted, seed = Wanted(data.captions.keys), experiment.train.seed
    found = [tuple(survey(expand(source.shards, where), wanted, cache, where)) for source in data.train]
    weights = tuple(source.weight for source in data.train)
    counts = [tuple(shard.samples for shard in source) for source in found]
    order: Stream
    if set(weights) == {1.0}:
        order = Order(tuple(itertools.chain(*counts)), seed, data.shuffle_window)
    else:
        order = Mixture(tuple(Order(c, seed + i, data.shuffle_window) for i, c in enumerate(counts)), weights, seed)
    if experiment.train.global_batch > order.samples:
        raise InputError(
            "train.global_batch",
            experiment.train.global_batch,
            f"at most the {order.samples} samples of an epoch of {where}",
            "lower it or add data",
        )
    return Reading(tuple(itertools.chain(*found)), order)


def _image_size(experiment: Experiment, index: int) -> int:
    given = experiment.stage_data(index).image_size
    return given or int(model_config(experiment.chain[index].model)["vision_cfg"]["image_size"])


def worker_cpus(experiment: Experiment) -> float:
    """CPUs of a worker: as configured, else this machine's cores shared out among the workers."""
    given = experiment.compute.cpus_per_worker
    return given if given is not None else max(1, (os.cpu_count() or 1) // experiment.most_workers)


def _stages(
    experiment: Experiment, readings: Sequence[Reading], out: Folder, others: Others = ALONE
) -> tuple[StageTask, ...]:
    recipe, stages, key = experiment.train, [], ""
    every = experiment.evaluate.every
    for index, (stage, reading) in enumerate(zip(experiment.chain, readings, strict=True)):
        data = experiment.stage_data(index)
        epoch_samples = data.samples or reading.order.samples
        lengths = {"epoch_samples": epoch_samples, "global_batch": recipe.global_batch}
        steps = stage.epochs.steps(**lengths)
        if steps < 1:
            raise InputError(
                f"chain.{index}.epochs",
                stage.epochs,
                "at least one optimiser step",
                "lengthen it or lower global_batch",
            )
        grown = experiment.transfer if index else None
        own_warmup = stage.warmup or (grown and grown.warmup) or recipe.warmup
        warmup, cooldown = own_warmup.steps(**lengths, stage_steps=steps), _cooldown(recipe, lengths, steps)
        if warmup + cooldown >= steps:
            given = f"{warmup} warm-up steps" + (f" and {cooldown} of the cool-down" if cooldown else "")
            raise InputError(f"chain.{index}", f"{given} of {steps}", "less than the stage",
                             f'set chain.{index}.warmup, for example "10 %"')  # fmt: skip
        rungs = set()
        for length in (stage.epochs, *others[min(index, 1)]) if cooldown else ():
            total = length.steps(**lengths)
            rung = total - _cooldown(recipe, lengths, total)
            if own_warmup.steps(**lengths, stage_steps=total) == warmup < rung <= steps - cooldown:
                rungs.add(rung)
        config = model_config(stage.model)
        image_size = _image_size(experiment, index)
        spec = Spec(Wanted(data.captions.keys), image_size, make_tokenizer(config)[1], data.crop is not None)
        spec = fitting(spec, sum(reading.order.counts), experiment.preload.budget)
        lr = stage.lr or recipe.lr * (grown.lr_scale if grown else 1)
        betas, eps = adam_constants(recipe, config)
        precision = recipe.precision or ("bf16" if experiment.compute.gpus_per_worker else "fp32")
        average = max(1, recipe.average.steps(**lengths, stage_steps=steps)) if recipe.average else 0
        content = {
            "schema": SCHEMA,
            "model": config,
            "image_size": image_size,
            "data": {
                "shards": [shard.identity for shard in reading.shards],
                "weights": [source.weight for source in data.train],
                "captions": data.captions.model_dump(mode="json"),
                "crop": data.crop,
                "window": data.shuffle_window,
                "pixels": spec.pixels,
            },
            "warmup": warmup,
            "lr": lr,
            "adam": [betas, eps],
            "precision": precision,
            "recipe": recipe.model_dump(mode="json", include={"global_batch", "schedule", "weight_decay", "clip_norm"}),
            "transfer": _inherited(grown) if grown else None,
            "seed": recipe.seed + index,
            "previous": key,
        }
        trunk = _digest(content | {"trunk": True}) if cooldown else ""
        own = {"steps": steps, "average": average} | ({"cooldown": cooldown} if cooldown else {})
        key = _digest(content | own)
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
                average=average,
                cooldown=cooldown,
                trunk=trunk,
                rungs=tuple(sorted(rungs)),
                feed=Feed(reading.shards, reading.order, spec, data.captions.per_image, data.crop),
                epoch_samples=epoch_samples,
                eval_every=max(1, every.steps(**lengths)) if every else 0,
                epochs=round(steps * recipe.global_batch / epoch_samples, 4),
                params=parameter_count(stage.model),
                macs=stage_macs(
                    student,
                    forward_macs(teacher, image_size) if teacher else None,
                    steps * recipe.global_batch,
                    data.captions.per_image,
                ),
                published=isinstance(record, dict) and record.get("key") == key,
            )
        )
    return tuple(stages)


def totals(task: ChainTask, wall_s: float) -> dict[str, Any]:
    """`totals` of run.json: the chain's MACs against the baseline's."""
    experiment = task.experiment
    first, last = task.stages[0], task.stages[-1]
    lengths = {"epoch_samples": first.epoch_samples, "global_batch": experiment.train.global_batch}
    baseline = experiment.baseline or Baseline(model=last.model, epochs=experiment.chain[0].epochs)
    samples = baseline.epochs.steps(**lengths) * experiment.train.global_batch
    alone = stage_macs(forward_macs(baseline.model, last.image_size), None, samples, last.feed.per_image)
    macs = sum(stage.macs for stage in task.stages)
    return {
        "macs": macs,
        "baseline_macs": alone,
        "percent_of_baseline": round(100 * macs / alone, 2),
        "speedup": round(alone / macs, 3),
        "wall_s": round(wall_s, 3),
    }


def _cooldown(recipe: Train, lengths: dict[str, int], steps: int) -> int:
    """Steps of the cool-down of a stage of `steps`."""
    if recipe.schedule != "wsd":
        return 0
    return max(1, (recipe.cooldown or Duration(20, "%")).steps(**lengths, stage_steps=steps))


def _inherited(transfer: Transfer) -> dict[str, Any]:
    """Of `transfer` what a key does not hold elsewhere; `shrink` came later, stages without it keep their keys."""
    return transfer.model_dump(
        mode="json", exclude={"warmup", "lr_scale"} | ({"shrink"} if transfer.shrink == 1 else set())
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]
