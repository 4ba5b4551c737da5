"""`raychain.grow`: grows one checkpoint into a larger model and says how far its function moved."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from open_clip.model import get_model_preprocess_cfg, set_model_preprocess_cfg
from torch import nn

from raychain.api.grow_language import grow_language
from raychain.core.storage import local_path
from raychain.data import members
from raychain.data.addresses import expand
from raychain.data.decode import resize_exactly
from raychain.data.fetch import open_input
from raychain.data.health import Unusable, picture
from raychain.data.spec import SQUARED, squared
from raychain.errors import InputError, nearest
from raychain.growth import GrowthError, GrowthReport, check
from raychain.growth import grow as grow_modules
from raychain.growth.drift import TowerDrift, measure_backbone_drift, measure_drift, random_inputs
from raychain.growth.operators import DEFAULT_DEPTH, DEFAULT_WIDTH
from raychain.models import UnknownModelError, build, model_config, model_names
from raychain.models.architectures import describe
from raychain.models.checkpoints import Checkpoint, CheckpointError, read_checkpoint
from raychain.models.configs import ModelConfig
from raychain.models.language_folders import FILES as LANGUAGE_FILES
from raychain.models.language_folders import is_language
from raychain.models.registry import use_models
from raychain.models.remote import local_checkpoint
from raychain.models.timm_checkpoints import CONFIG as TIMM_CONFIG
from raychain.models.timm_checkpoints import TimmCheckpoint, build_timm, is_timm, read_timm, write_timm
from raychain.models.tokenizing import make_tokenizer
from raychain.paradigms import make_paradigm, usable_size
from raychain.paradigms.classify.models import OWN
from raychain.paradigms.lm.axes import describe as describe_language
from raychain.paradigms.task import Task
from raychain.training.artifact import write_artifact

CAPTION_KEYS = ("txt", "json.captions")


class Grown(NamedTuple):
    """A grown checkpoint: where it is, how it grew, and how far each tower's function moved."""

    folder: Path
    report: GrowthReport
    drift: dict[str, TowerDrift]


def grow(small: nn.Module, large: nn.Module, *, width: str = DEFAULT_WIDTH, depth: str = DEFAULT_DEPTH) -> GrowthReport:
    """Writes `large`'s parameters in place, from `small`'s and its own random ones (`raychain.growth.grow`).

    Both are open_clip models, or both timm ViTs (DeiT, DINOv2, …) or Swin transformers, or both Llama, Qwen3 or GPT-2
    models of transformers; the function is kept where the operators keep it. Raises GrowthError naming what cannot
    grow, before anything is written.
    """
    of_transformers = hasattr(getattr(small, "config", None), "model_type")
    described = describe_language if of_transformers else describe
    return grow_modules(small, large, width=width, depth=depth, describe=described)


def grow_checkpoint(
    small: str | Path,
    to: str,
    out: str | Path,
    *,
    width: str = DEFAULT_WIDTH,
    depth: str = DEFAULT_DEPTH,
    source: str | None = None,
    seed: int = 0,
    data: str | None = None,
    samples: int = 4,
    models: str | None = None,
) -> Grown:
    """Grows the checkpoint `small` into the model named `to` and writes it to the new folder `out`.

    `small` is a folder or a file as `read_checkpoint` takes it, also on object storage; `source` names its architecture
    where the file does not. `seed` draws the large model's random parameters. The drift is measured on `samples` random
    inputs, or on the first samples of the shards that `data` names. `models` is a folder of open_clip model configs
    whose names `to` and `source` may be. Unmodified open_clip loads the result as `local-dir:OUT`.

    A plain timm model (a folder as timm saves it, or a weights file with `source`, without open_clip's towers in it)
    grows into the timm model `to`, or one of raychain's names for such (`CoM-DeiT-S`), at its own picture size and
    number of classes; unmodified timm loads the result as `local-dir:OUT`. Its drift is that of the class scores on
    random input. The folder of a language model grows into the language model `to`, in a folder that transformers
    loads; its drift is that of the logits.

    Raises InputError for anything that is wrong with the arguments, before anything is written.
    """
    folder = _new_folder(out)
    use_models(models, "--models")
    with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
        try:
            path = local_checkpoint(str(small), Path(scratch), also=[TIMM_CONFIG, *LANGUAGE_FILES])
        except CheckpointError as error:
            raise InputError("SMALL", small, "a checkpoint that can be read", str(error)) from None
        if is_language(path):
            if data is not None or source is not None:
                option = "--data" if data is not None else "--from"
                raise InputError(option, data or source, "nothing for a language model's folder", f"leave {option} out")
            return Grown(folder, *grow_language(path, str(small), to, folder, width, depth, seed, samples))
        if is_timm(path, source):
            return _grow_timm(path, to, folder, width, depth, source, seed, data, samples)
        checkpoint = _read(path, small, source)
    config, size = _target(checkpoint, to)
    try:
        check(checkpoint.model, build(to, seed=seed, image_size=size, device="meta"), width=width, depth=depth)
    except GrowthError as error:
        raise InputError(
            "raychain grow", f"{small} → {to}", f"a pair that {width} + {depth} can grow", str(error)
        ) from None
    inputs = _read_inputs(checkpoint, data, samples) if data else random_inputs(checkpoint.model, samples, seed)
    model = build(to, seed=seed, image_size=size)
    report = grow(checkpoint.model, model, width=width, depth=depth)
    drift = measure_drift(checkpoint.model, model, *inputs)
    preprocessing = {**get_model_preprocess_cfg(checkpoint.model), "size": model.visual.image_size}
    set_model_preprocess_cfg(model, preprocessing)
    del checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    write_artifact(folder, make_paradigm(Task()), model, config, _pixels(model))
    return Grown(folder, report, drift)


def _grow_timm(
    small: Path, to: str, folder: Path, width: str, depth: str, source: str | None, seed: int, data: str | None, n: int
) -> Grown:
    """`grow_checkpoint` of a plain timm model; `n` samples."""
    if data is not None:
        raise InputError("--data", data, "random input for a timm model", "leave --data out")
    try:
        before = read_timm(small, source)
    except CheckpointError as error:
        raise InputError("SMALL", small, "a timm model's folder, or weights file with --from", str(error)) from None
    shared = ("in_chans", "num_classes", "img_size")
    options = {name: value for name, value in before.options.items() if name in shared}
    architecture, own, *_ = OWN.get(to, (to, {}))
    options = own | options
    try:
        check(before.model, build_timm(architecture, options, seed=seed, device="meta"), width=width, depth=depth)
    except GrowthError as error:
        allowed = f"a pair that {width} + {depth} can grow"
        raise InputError("raychain grow", f"{small} → {to}", allowed, str(error)) from None
    except ValueError as error:
        unknown = nearest(to, [*OWN, *timm.list_models()], "python -c 'import timm; print(timm.list_models())'")
        fix = "name a model of SMALL's kind" if timm.is_model(architecture) else unknown
        raise InputError("--to", to, f"a timm model that is made as SMALL is ({error})", fix) from None
    after = build_timm(architecture, options, seed=seed)
    report = grow(before.model, after, width=width, depth=depth)
    drift = {"classifier": measure_backbone_drift(before.model, after, n, seed)}
    folder.mkdir(parents=True, exist_ok=True)
    write_timm(folder, TimmCheckpoint(after, architecture, options, before.preprocessing))
    return Grown(folder, report, drift)


def _new_folder(out: str | Path) -> Path:
    folder = local_path(out, "--out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("--out", out, "a new or empty folder", "give another folder, or remove this one")
    parent = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        (probe := parent / ".raychain-grow").touch()
        probe.unlink()
    except OSError as error:
        raise InputError("--out", out, f"a folder that can be written ({error})", "give another folder") from None
    return folder


def _read(path: Path, small: str | Path, source: str | None) -> Checkpoint:
    """The checkpoint at `path`, which the user called `small`."""
    try:
        return read_checkpoint(path, source)
    except UnknownModelError as error:
        fix = nearest(source or "", model_names(), "name an architecture that raychain or open_clip knows")
        raise InputError("--from" if source else "SMALL", source or small, str(error), fix) from None
    except CheckpointError as error:
        allowed = "a folder with open_clip_config.json and weights, or a .safetensors or .pt file of a state dict"
        fix = "name the file's architecture with --from" if source is None else "check that --from is the file's model"
        raise InputError("SMALL", small, allowed, f"{error}; {fix}") from None


def _target(checkpoint: Checkpoint, to: str) -> tuple[ModelConfig, int | None]:
    """The large model's config and image size: the small model's, unless the large one's trunk has its own."""
    usable_size(Task(), to, None, "--to")
    config = model_config(to)
    if "timm_model_name" in config["vision_cfg"]:
        return config, None
    size = _pixels(checkpoint.model)
    try:
        build(to, seed=0, image_size=size, device="meta")
    except ValueError:
        return config, None
    return config, size


def _pixels(model: Any) -> int:
    size = model.visual.image_size
    return int(size if isinstance(size, int) else size[0])


def _read_inputs(checkpoint: Checkpoint, data: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first pictures and captions of the shards, preprocessed for the checkpoint's model."""
    preprocessing, tokenize = get_model_preprocess_cfg(checkpoint.model), make_tokenizer(checkpoint.config)
    try:
        size, resizing = squared(preprocessing)
    except ValueError as error:
        raise InputError("SMALL", f"a model for {error}", SQUARED, "measure on random input, without --data") from None
    images: list[np.ndarray] = []
    texts: list[str] = []
    wanted = members.Wanted(CAPTION_KEYS)
    for address in expand([data], "--data"):
        try:
            with open_input(address) as file:
                for sample in islice(members.samples(file, wanted), count - len(images)):
                    try:
                        captions = members.annotation(sample, wanted).captions
                        images.append(picture(resize_exactly, members.picture(sample), size, resizing))
                    except Unusable:
                        continue
                    texts += captions[:1]
        except OSError as error:
            raise InputError("--data", address, "shards that can be read", str(error)) from None
        if len(images) >= count:
            break
    if not images or not texts:
        raise InputError("--data", data, f"shards with {wanted}", "give other shards")
    mean, std = (torch.tensor(preprocessing[key]) for key in ("mean", "std"))
    x_b3HW = ((torch.from_numpy(np.stack(images)) / 255 - mean) / std).permute(0, 3, 1, 2)
    return x_b3HW, torch.from_numpy(np.asarray(tokenize(texts))).long()
