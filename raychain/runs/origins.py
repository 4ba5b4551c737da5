"""Checkpoints that one has already, as stages without steps.

The driver reads one, checks it and publishes it in the run folder as a finished stage with the status `given`, so that
every worker finds it where it finds stages, and resuming, measuring, growing and sharing are the same for both.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash

from raychain import records
from raychain.config.experiment import Experiment
from raychain.core.finite import not_finite
from raychain.core.storage import Folder
from raychain.core.wording import named_by, uncounted
from raychain.data.loader import Feed
from raychain.errors import InputError, RunFailed
from raychain.growth import Moments
from raychain.models.remote import FORMS, is_name, local_checkpoint, stages_in
from raychain.paradigms import make_paradigm, model_size
from raychain.paradigms.base import Config, Paradigm
from raychain.paradigms.task import Task
from raychain.runs.identity import given_key
from raychain.training.artifact import OPTIMIZER, load_moments
from raychain.training.finished import STAGE_RECORD, FinishedStages, Trained
from raychain.training.task import ChainTask, Former, Given, StageTask


class Origin(NamedTuple):
    """A checkpoint that an experiment names."""

    where: str
    """The option that holds its address."""
    checkpoint: str
    model: str


class Found(NamedTuple):
    """What a checkpoint holds, checked, for inputs of the size that was asked for."""

    trained: Trained
    config: Config
    digest: str
    """Hash of its configuration's weights, and of AdamW's moments where they are grown."""


def named(experiment: Experiment) -> Experiment:
    """The experiment with the names of its checkpoints' models, where it leaves them to the checkpoints.

    Those of unknown models become known to this process. Raises InputError for checkpoints that do not say.
    """
    paradigm, chain = make_paradigm(experiment.task), []
    for index, stage in enumerate(experiment.chain):
        if stage.checkpoint is not None and not stage.model:
            name = _name(paradigm, stage.checkpoint, f"chain.{index}.checkpoint", f"chain.{index}.model")
            stage = stage.model_copy(update={"model": name})
        elif stage.start and not stage.start.model:
            name = _name(paradigm, stage.start.checkpoint, f"chain.{index}.start", f"chain.{index}.start.model")
            stage = stage.model_copy(update={"start": stage.start.model_copy(update={"model": name})})
        chain.append(stage)
    return experiment if tuple(chain) == experiment.chain else experiment.model_copy(update={"chain": tuple(chain)})


def given_stage(experiment: Experiment, origin: Origin, index: int, folder: str, size: int, feed: Feed,
                out: Folder) -> StageTask:  # fmt: skip
    """The checkpoint as a stage without steps, which is `index` of the chain or before it, for inputs of `size`.

    `feed` is that of the stage that follows. Raises InputError for a checkpoint that is not what it should be.
    """
    task, checkpoint = experiment.task, origin.checkpoint
    found = read(experiment, origin, size)
    source = Folder(checkpoint.removeprefix("local-dir:"))
    if source.fs == out.fs and f"{source.path}/".startswith(f"{out.path}/"):  # its stages make way for this chain's
        raise InputError(origin.where, checkpoint, "a checkpoint outside of the run's own folder",
                         "give the run another `name` or --out, or copy the checkpoint")  # fmt: skip
    options = {} if task == Task() else task.identity
    key = given_key(found.digest, found.config, size, options)
    record = records.read(out, f"stages/{folder}/{STAGE_RECORD}", records.StageRecord, quiet=True)
    return StageTask(
        index=index,
        model=origin.model,
        config=found.config,
        size=size,
        key=key,
        former=Former(key, key, None, "", "", 0.0),
        folder=folder,
        steps=0,
        warmup=0,
        lr=0.0,
        betas=(0.0, 0.0),
        eps=0.0,
        precision="fp32",
        average=0,
        cooldown=0,
        trunk="",
        rungs=(),
        feed=feed,
        epoch_samples=feed.order.samples,
        eval_every=0,
        epochs=0.0,
        params=model_size(task, origin.model, size).params,
        macs=0,
        published=record is not None and record.key == key,
        given=Given(checkpoint, found.digest, origin.where, found.trained.moments is not None),
    )


def publish(task: ChainTask, stage: StageTask) -> None:
    """Writes a given stage into the run folder. Raises RunFailed where the checkpoint has changed since it was read
    for its key, and OSError.
    """
    assert stage.given is not None, "it is trained otherwise"
    where, checkpoint, digest = stage.given.where, stage.given.checkpoint, stage.given.digest
    found = read(task.experiment, Origin(where, checkpoint, stage.model), stage.size)
    if found.digest != digest:
        raise RunFailed(f"{checkpoint} has changed since the run began; the same command again takes it as it is now")
    FinishedStages(task).give(stage, found.trained)


def remarks(task: ChainTask) -> list[str]:
    """What a user should know of the checkpoints of a chain, a sentence each."""
    shown = [{"model": stage.model, "epochs": stage.epochs, "origin": stage.origin} for stage in task.stages]
    found = uncounted(shown)
    for stage in task.stages:
        before = task.before(stage)
        if before and before.given and task.experiment.transfer.optimizer == "grow" and not before.given.moments:
            name = named_by(before.given.checkpoint)
            found.append(f"{name} has no AdamW moments ({OPTIMIZER}): those of {stage.model} begin at zero")
    return found


def read(experiment: Experiment, origin: Origin, size: int) -> Found:
    """The checkpoint, for inputs of that size. Raises InputError, as nothing of it can be used where it is wrong."""
    paradigm, given = make_paradigm(experiment.task), origin.checkpoint
    moments_too = experiment.transfer.optimizer == "grow"
    with _local(paradigm, given, origin.where) as path:
        model, config = paradigm.read(path, origin.model)
        moments = load_moments(path) if moments_too and path.is_dir() else None
        trained = Trained(model, moments)
        problem = not_finite(model.state_dict()) or _unlike(paradigm, config, trained, size)
        if problem is None and moments is not None:
            problem = not_finite({**moments.exp_avg, **{f"{n} (square)": v for n, v in moments.exp_avg_sq.items()}})
        if problem is not None:
            raise ValueError(f"it is of no use as {origin.model}: {problem}")
        digest = _digest(model.state_dict(), moments)
        return Found(trained.resized(paradigm, config, size), config, digest)


def _unlike(paradigm: Paradigm, config: Config, found: Trained, size: int) -> str | None:
    """What of a checkpoint is not the model's, at the size of its inputs; None if all is."""
    wanted = paradigm.build(config, size=size, seed=0, device="meta").state_dict()
    given = paradigm.adapt(found.model, config, size).state_dict()
    if odd := sorted(wanted.keys() ^ given.keys()):
        return f"{'the model has no' if odd[0] in given else 'it has no'} {odd[0]}"
    if odd := [name for name, value in wanted.items() if value.shape != given[name].shape]:
        return f"{odd[0]} has shape {tuple(given[odd[0]].shape)}, the model's {tuple(wanted[odd[0]].shape)}"
    shapes = {name: value.shape for name, value in found.model.named_parameters()}
    for moments in (found.moments.exp_avg, found.moments.exp_avg_sq) if found.moments else ():
        if odd := [name for name, value in moments.items() if shapes.get(name) != value.shape]:
            return f"{OPTIMIZER} has moments of {odd[0]} that are not the model's"
    return None


def _name(paradigm: Paradigm, address: str, where: str, option: str) -> str:
    """The name of a checkpoint's model. Raises InputError where it does not say."""
    with _local(paradigm, address, where, weights=False) as path:
        folder = Folder(str(path if path.is_dir() else path.parent))
        record = records.read(folder, STAGE_RECORD, records.StageRecord, quiet=True)
        name = paradigm.model_in(path, (record.model if record else None) or "")
    if not name:
        raise InputError(option, "nothing", "the name of the checkpoint's model",
                         f"{address} does not say which model it is: write {{checkpoint: …, model: NAME}}")  # fmt: skip
    return name


@contextlib.contextmanager
def _local(paradigm: Paradigm, address: str, where: str, *, weights: bool = True) -> Iterator[Path]:
    """A path of this machine to a checkpoint. What is raised inside is an InputError, whatever a reader says of it."""
    if is_name(address):
        raise InputError(where, f"{address}, a name", FORMS,
                         "nothing is downloaded here: save the weights yourself, and give their file")  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
            copy = Path(scratch) / (Path(named_by(address)).stem or "checkpoint")
            copy.mkdir()
            path = local_checkpoint(address, copy, {*paradigm.files, OPTIMIZER, STAGE_RECORD}, weights=weights)
            if not path.exists():
                raise FileNotFoundError(f"{address} does not exist")
            yield path
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a file's bytes may be anything, and paradigms of packages have readers of their own
        raise InputError(where, address, FORMS, f"{error}; {stages_in(address) or 'check the checkpoint'}") from None


def _digest(tensors: Mapping[str, torch.Tensor], moments: Moments | None) -> str:
    """Hash of names and values. The form of the file that held them has no part in it, nor its place."""
    named = dict(tensors)
    if moments is not None:
        named |= {f"exp_avg/{name}": value for name, value in moments.exp_avg.items()}
        named |= {f"exp_avg_sq/{name}": value for name, value in moments.exp_avg_sq.items()}
        named["step"] = torch.tensor(moments.step)
    digest = xxhash.xxh3_128()
    for name, value in sorted(named.items()):
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
