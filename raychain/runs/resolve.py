"""From an experiment to the task of the workers: data found and counted, step numbers, stage keys. Without Ray."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from raychain import records
from raychain.config.experiment import Change, Data, Experiment, Train, Transfer
from raychain.core.json import Json
from raychain.core.storage import Folder, below, is_local, local_path
from raychain.data.addresses import expand
from raychain.data.commands import UnrunError, say_they_run, unexecuted
from raychain.data.index import shared
from raychain.data.lanes import usual_lanes
from raychain.data.loader import Feed
from raychain.data.mixture import BLOCK, Mixture
from raychain.data.order import Order, Stream
from raychain.data.pictures import PictureReader
from raychain.data.reader import Reader
from raychain.data.shards import Shard
from raychain.data.spec import representation
from raychain.demo import DemoError, is_current, make_demo
from raychain.errors import InputError
from raychain.evaluators.evaluator import Setting
from raychain.evaluators.suite import resolve_suite
from raychain.paradigms import make_paradigm, model_size, projects
from raychain.paradigms.objective import PROJECTOR
from raychain.paradigms.task import Task
from raychain.planning.macs import stage_macs
from raychain.reporting.health import DataHealth
from raychain.runs.checks import check_finishing, check_health, input_size
from raychain.runs.identity import FORMER_SCHEMA, Determinants, stage_key, trunk_key
from raychain.runs.origins import Origin, given_stage
from raychain.runs.takeover import finished
from raychain.schema.durations import Duration
from raychain.training.finished import STAGE_RECORD
from raychain.training.task import Before, ChainTask, Former, RateChange, StageTask, worker_cpus


class Others(NamedTuple):
    """Lengths that first and grown stages have in other chains."""

    first: tuple[Duration, ...] = ()
    grown: tuple[Duration, ...] = ()
    own: Mapping[tuple[str, str], tuple[Duration, ...]] = MappingProxyType({})
    """More of them by the model before, empty for first stages, and the stage's own."""


ALONE = Others()
"""A chain that is trained for itself."""


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
    demo = experiment.data.demo
    if demo:
        try:
            make_demo(Path(demo.out), names=demo.names, pictures=demo.pictures, seed=demo.seed, on_progress=on_progress)
        except DemoError as error:
            raise InputError("data.demo", demo.out, "a folder for demo shards", str(error)) from None
    cache = _cache_folder(experiment)
    classes = make_paradigm(experiment.task).classes
    setting = Setting(cache, experiment.data.captions.keys, experiment.data.key_split, classes)
    with shared(store or experiment.storage, keep=store is not None):
        suite = resolve_suite(experiment.evaluate, setting)
        readings = _readings(experiment, cache)
    task = ChainTask(
        experiment=experiment,
        out=Folder(out).path if is_local(out) else out,
        store=store,
        stages=resolve_stages(experiment, readings, Folder(out)),
        suite=suite,
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
    stages = resolve_stages(experiment, readings, Folder(out), others)
    return replace(task, experiment=experiment, out=Folder(out).path if is_local(out) else out, stages=stages)


def dry_plan(experiment: Experiment) -> Json:
    """What `--dry-run` shows: every stage's steps, MACs and key, and how many shards were counted in which way.

    Demo shards that are not there yet are not rendered, and commands that are shards are not run: without a count of
    theirs `data.samples` tells how long stages are, and keys are None.
    """
    demo, out = experiment.data.demo, below(experiment.storage, experiment.name)
    if demo and not is_current(Path(demo.out), names=demo.names, pictures=demo.pictures, seed=demo.seed):
        task, samples = None, [demo.pictures] * len(experiment.chain)
    else:
        task, samples = _unexecuted_task(experiment, out)
    if task:
        stages, published = task.stages, finished(task, Folder(out))
        keys: list[str | None] = [stage.key for stage in stages]
        sources = [shard.source for shard in task.shards]
    else:
        readings = [Reading((), Order((count,), experiment.train.seed)) for count in samples]
        stages, sources = resolve_stages(experiment, readings, Folder(out)), []
        keys, published = [None] * len(stages), [False] * len(stages)
    shown = ("model", "params", "epoch_samples", "epochs", "steps", "warmup", "lr", "macs", "origin")
    plan = [{name: getattr(stage, name) for name in shown} for stage in stages]
    entries = [entry | {"published": p, "key": k} for entry, p, k in zip(plan, published, keys, strict=True)]
    return {"stages": entries, "counts": dict(Counter(sources))}


def _unexecuted_task(experiment: Experiment, out: str) -> tuple[ChainTask | None, list[int]]:
    """The task as it is known without running commands; without one the samples of each stage. Raises InputError."""
    try:
        with unexecuted():
            return make_task(experiment, out), []
    except UnrunError:
        samples = [experiment.stage_data(i).samples for i in range(len(experiment.chain))]
        if None in samples:
            raise
        return None, [count for count in samples if count]


def epoch_samples(experiment: Experiment, data: Data, where: str = "data.train") -> int:
    """Samples of an epoch of `data`: as stated, as the demo will render them, or counted. Raises InputError."""
    demo = experiment.data.demo
    if data.samples:
        return data.samples
    if demo and not is_current(Path(demo.out), names=demo.names, pictures=demo.pictures, seed=demo.seed):
        return demo.pictures
    with shared(experiment.storage, keep=False):
        return _reading(experiment, data, _cache_folder(experiment), where).order.samples


def _cache_folder(experiment: Experiment) -> Path:
    """The folder `preload.cache`, with one in it for what is counted. Raises InputError if it cannot be written."""
    cache = local_path(experiment.preload.cache, "preload.cache")
    try:
        (cache / "counts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("preload.cache", cache, "a folder that can be written", str(error)) from None
    return cache


class Reading(NamedTuple):
    """The shards of a stage and the order of their samples."""

    shards: tuple[Shard, ...]
    order: Stream


def _readings(experiment: Experiment, cache: Path) -> list[Reading]:
    """Each stage's data, found and counted once where stages share it. Raises InputError."""
    known: dict[Data, Reading] = {}
    readings = []
    for place in range(len(experiment.chain)):
        index = max(place, experiment.first_trained)  # what is given reads nothing
        data = experiment.stage_data(index)
        if data not in known:
            own = "train" in experiment.chain[index].data.model_fields_set
            known[data] = _reading(experiment, data, cache, f"chain.{index}.data.train" if own else "data.train")
        readings.append(known[data])
    return readings


def _reading(experiment: Experiment, data: Data, cache: Path, where: str) -> Reading:
    paradigm, seed = make_paradigm(experiment.task), experiment.train.seed
    addresses = [expand(source.shards, where, commands=True) for source in data.train]
    say_they_run(where, list(itertools.chain(*addresses)))
    found = [tuple(paradigm.survey(part, data, cache, where)) for part in addresses]
    weights = tuple(source.weight for source in data.train)
    counts = [tuple(shard.samples for shard in source) for source in found]
    merged = set(weights) != {1.0}
    smallest = min(map(sum, counts)) if merged else sum(map(sum, counts))
    lanes = data.lanes or usual_lanes(sum(map(len, counts)), smallest)
    if lanes > smallest:
        what = f"the {smallest} samples of {'its smallest source' if merged else where}"
        raise InputError("data.lanes", lanes, f"at most {what}", "lower it, or leave it out")
    parts = counts if merged else [tuple(itertools.chain(*counts))]
    orders = tuple(Order(c, seed + i, data.shuffle_window, lanes=lanes) for i, c in enumerate(parts))
    order: Stream = Mixture(orders, weights, seed) if merged else orders[0]
    if experiment.train.global_batch > order.samples:
        raise InputError(
            "train.global_batch",
            experiment.train.global_batch,
            f"at most the {order.samples} samples of an epoch of {where}",
            "lower it or add data",
        )
    return Reading(tuple(itertools.chain(*found)), order)


def resolve_stages(
    experiment: Experiment, readings: Sequence[Reading], out: Folder, others: Others = ALONE
) -> tuple[StageTask, ...]:
    """The chain's stages in numbers, each on its reading. Raises InputError for stages too short for their warm-up."""
    stages: list[StageTask] = []
    for index, reading in enumerate(readings):
        if experiment.chain[index].checkpoint is not None:
            stages.append(_given(experiment, index, reading, out))
        else:
            stages.append(_stage(experiment, index, reading, out, others, stages[-1] if stages else None))
    return tuple(stages)


def _given(experiment: Experiment, index: int, reading: Reading, out: Folder) -> StageTask:
    """The checkpoint that is stage `index`, or that the stage starts from. Raises InputError."""
    stage, size = experiment.chain[index], input_size(experiment, index)
    if stage.start:
        origin = Origin(f"chain.{index}.start", stage.start.checkpoint, stage.start.model)
    else:
        origin = Origin(f"chain.{index}.checkpoint", str(stage.checkpoint), stage.model)
    paradigm = make_paradigm(experiment.task)
    data, config = experiment.stage_data(index), paradigm.config(origin.model)
    reader = paradigm.reader(data, config, size, sum(reading.order.counts))
    folder = _folder(index, f"start-{origin.model}" if stage.start else origin.model)
    feed = Feed(reading.shards, reading.order, reader)
    return given_stage(experiment, origin, index, folder, size, feed, out)


def _folder(index: int, name: str) -> str:
    return f"{index}-{re.sub(r'[^A-Za-z0-9._-]', '_', name)}"


def _stage(
    experiment: Experiment, index: int, reading: Reading, out: Folder, others: Others, before: StageTask | None
) -> StageTask:
    """The task of one stage, which follows `before` unless it starts from a checkpoint."""
    recipe, stage, data = experiment.train, experiment.chain[index], experiment.stage_data(index)
    start = _given(experiment, index, reading, out) if stage.start else None
    before = start or before
    grown, every = experiment.transfer if before else None, experiment.evaluate.every
    epoch_samples = data.samples or reading.order.samples
    lengths = {"epoch_samples": epoch_samples, "global_batch": recipe.global_batch}
    steps = stage.length.steps(**lengths)
    if steps < 1:
        raise InputError(
            f"chain.{index}.epochs", stage.length, "at least one optimiser step", "lengthen it or lower global_batch"
        )
    own_warmup = stage.warmup or (grown and grown.warmup) or recipe.warmup
    warmup, cooldown = own_warmup.steps(**lengths, stage_steps=steps), _cooldown(recipe, lengths, steps)
    if warmup + cooldown >= steps:
        given = f"{warmup} warm-up steps" + (f" and {cooldown} of the cool-down" if cooldown else "")
        raise InputError(f"chain.{index}", f"{given} of {steps}", "less than the stage",
                         f'set chain.{index}.warmup, for example "10 %"')  # fmt: skip
    rungs = set()
    place = (before.model if before else "", stage.model)
    elsewhere = (*(others.grown if index else others.first), *others.own.get(place, ()))
    for length in (stage.length, *elsewhere) if cooldown else ():
        total = length.steps(**lengths)
        rung = total - _cooldown(recipe, lengths, total)
        alike = _follows(grown, lengths, total) == _follows(grown, lengths, steps)
        if alike and own_warmup.steps(**lengths, stage_steps=total) == warmup < rung <= steps - cooldown:
            rungs.add(rung)
    taught = before if grown and grown.distill else None
    follows = _follows(grown, lengths, steps) if taught else 0
    paradigm = make_paradigm(experiment.task)
    config, size = paradigm.config(stage.model), input_size(experiment, index)
    config = paradigm.inherited(config, before.config) if before else config
    reader = paradigm.reader(data, config, size, sum(reading.order.counts))
    check_finishing(data, reader, experiment.task)
    betas, eps = paradigm.adam(config)
    betas, eps = recipe.betas or betas, recipe.eps or eps
    determinants = Determinants(
        model=config,
        size=size,
        shards=tuple(shard.identity for shard in reading.shards),
        weights=tuple(source.weight for source in data.train),
        window=data.shuffle_window,
        lanes=reading.order.lanes,
        counts=tuple(s.samples for s in reading.shards) if any(s.declared for s in reading.shards) else (),
        block=reading.order.block if isinstance(reading.order, Mixture) else BLOCK,
        reading=reader.identity,
        global_batch=recipe.global_batch,
        steps=steps,
        warmup=warmup,
        cooldown=cooldown,
        average=max(1, recipe.average.steps(**lengths, stage_steps=steps)) if recipe.average else 0,
        lr=stage.lr or recipe.lr * (grown.lr_scale if grown else 1),
        schedule=recipe.schedule,
        betas=betas,
        eps=eps,
        weight_decay=recipe.weight_decay,
        clip_norm=recipe.clip_norm,
        precision=recipe.precision or "fp32",
        transfer=grown,
        projector=PROJECTOR if taught and projects(experiment.task, config, taught.config, size) else "",
        seed=recipe.seed + index,
        task={} if experiment.task == Task() else experiment.task.identity,
        follows=follows,
        changes=_changes(stage.changes, lengths, steps, f"chain.{index}.changes"),
    )
    previous = before.key if before else ""
    key = stage_key(determinants, previous)
    folder = _folder(index, stage.model)
    record = records.read(out, f"stages/{folder}/{STAGE_RECORD}", records.StageRecord, quiet=True)
    student = model_size(experiment.task, stage.model, size)
    teacher = model_size(experiment.task, taught.model, size) if taught else None
    return StageTask(
        index=index,
        model=stage.model,
        config=config,
        size=size,
        key=key,
        former=_former(experiment, determinants, reading, reader, before),
        folder=folder,
        steps=steps,
        warmup=warmup,
        lr=determinants.lr,
        betas=betas,
        eps=eps,
        precision=determinants.precision,
        average=determinants.average,
        cooldown=cooldown,
        trunk=trunk_key(determinants, previous),
        rungs=tuple(sorted(rungs)),
        feed=Feed(reading.shards, reading.order, reader),
        epoch_samples=epoch_samples,
        eval_every=max(1, every.steps(**lengths)) if every else 0,
        epochs=round(steps * recipe.global_batch / epoch_samples, 4),
        params=student.params,
        macs=stage_macs(
            student, teacher, steps * recipe.global_batch, paradigm.items(data), follows * recipe.global_batch
        ),
        published=record is not None and record.key == key,
        changes=_histories(determinants, previous),
        tokens=paradigm.sample_tokens,
        follows=follows,
        start=start,
    )


def _changes(
    changes: Sequence[Change], lengths: dict[str, int], steps: int, where: str
) -> tuple[tuple[int, float], ...]:
    """The learning rates that a stage changes to, each after its step. Raises InputError."""
    found = tuple((change.at.steps(**lengths), change.lr) for change in changes)
    if any(a >= b for a, b in itertools.pairwise((0, *(step for step, _ in found), steps))):
        given = ", ".join(f"{change.at} (step {step})" for change, (step, _) in zip(changes, found, strict=True))
        raise InputError(where, given, f"rising steps from 1 to {steps - 1}", f"correct {where}.N.at")
    return found


def _histories(stage: Determinants, previous: str) -> tuple[RateChange, ...]:
    """The stage's changes, each with the identity of the stage that it changes."""
    found = []
    for number, (step, lr) in enumerate(stage.changes):
        before = replace(stage, changes=stage.changes[:number])
        found.append(RateChange(step, lr, stage_key(before, previous), trunk_key(before, previous)))
    return tuple(found)


def _former(
    experiment: Experiment, stage: Determinants, reading: Reading, reader: Reader, before: StageTask | None
) -> Former:
    """What schema 2 made of the same experiment: a machine decided there how pictures are kept, and the precision."""
    kept = reader.kept
    if isinstance(reader, PictureReader):
        kept = representation(sum(reading.order.counts), reader.spec.pixel_bytes, experiment.preload.budget)
    precision = experiment.train.precision or ("bf16" if experiment.compute.gpus_per_worker else "fp32")
    shards = tuple(shard.former for shard in reading.shards)
    then = replace(stage, shards=shards, reading={**stage.reading, "pixels": kept}, precision=precision)
    previous = before.former.key if before else ""
    key, begun = (stage_key(s, previous, FORMER_SCHEMA) for s in (then, replace(then, changes=())))
    touched = [(shard.changed, shard.address) for shard in reading.shards]
    touched += [(before.former.changed, before.former.shard)] if before else []
    changed, shard = max(touched, default=(0.0, ""))
    parent = Before(before.key, before.former.key, before.folder) if before else None
    return Former(key, begun, parent, kept, shard, changed)


def _follows(transfer: Transfer | None, lengths: dict[str, int], steps: int) -> int:
    """Steps over which a stage of `steps` follows its teacher less and less; 0 where it does to its end."""
    until = transfer.distill.until if transfer and transfer.distill else None
    return max(1, min(steps, until.steps(**lengths, stage_steps=steps))) if until else 0


def _cooldown(recipe: Train, lengths: dict[str, int], steps: int) -> int:
    """Steps of the cool-down of a stage of `steps`."""
    if recipe.schedule != "wsd":
        return 0
    return max(1, (recipe.cooldown or Duration(20, "%")).steps(**lengths, stage_steps=steps))
