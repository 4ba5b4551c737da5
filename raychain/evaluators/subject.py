"""What `raychain evaluate` measures: the model of a checkpoint, with how it reads pictures and texts.

open_clip's models take both; plain timm models take pictures, of which their features are what the classifier gets.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.model import get_model_preprocess_cfg
from torch import nn

from raychain.core.json import Json
from raychain.data.spec import SQUARED, Resizing, Tokenizer, squared
from raychain.data.tokens import Tokenizer as Words
from raychain.errors import InputError, nearest
from raychain.evaluators.encoding import image_features
from raychain.models import UnknownModelError, model_names
from raychain.models.checkpoints import CheckpointError, read_checkpoint
from raychain.models.language_folders import FILES as LANGUAGE_FILES
from raychain.models.language_folders import is_language, read_language
from raychain.models.remote import FORMS, is_name, local_checkpoint, stages_in
from raychain.models.timm_checkpoints import CONFIG, is_timm, read_timm
from raychain.models.tokenizing import make_tokenizer

ALLOWED = f"{FORMS}; also a timm model's folder or weights file"


@dataclass(frozen=True)
class Subject:
    """A model in fp32 on the CPU, and all that it is measured with but the data."""

    model: nn.Module
    takes: frozenset[str]
    """What it turns into features, `pictures` and `texts`, and `classes` where it gives scores of these."""
    tokenize: Tokenizer | None
    image_size: int
    """Pixels a side, or tokens."""
    resizing: Resizing
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int | None = None
    """How many classes it tells apart; None: it has no classes."""
    words: Words | None = None
    """The tokeniser of a language model, which reads `image_size` tokens at a time."""


def read_subject(checkpoint: str, model: str | None) -> Subject:
    """The subject in a folder or file, local or on object storage, of the architecture `model` if it does not say it.

    Raises InputError. Nothing is downloaded but what the user's own address names.
    """
    fix = "check the file" if model else "name the file's architecture with --model, if it has no open_clip_config.json"
    if is_name(checkpoint):
        raise InputError("CHECKPOINT", f"{checkpoint}, a name", ALLOWED, "nothing is downloaded here: save the weights "
                         "yourself, and give their file with --model NAME")  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
            path = local_checkpoint(checkpoint, Path(scratch), also=[CONFIG, *LANGUAGE_FILES])
            if is_language(path):
                return _of_language(path)
            return _of_timm(path, checkpoint, model) if is_timm(path, model) else _of_open_clip(path, checkpoint, model)
    except UnknownModelError as error:
        raise InputError("--model" if model else "CHECKPOINT", model or checkpoint, str(error),
                         nearest(model or "", model_names(), "give another one")) from None  # fmt: skip
    except CheckpointError as error:
        raise InputError("CHECKPOINT", checkpoint, ALLOWED, f"{error}; {stages_in(checkpoint) or fix}") from None


def _of_language(path: Path) -> Subject:
    read = read_language(path)
    return Subject(read.model, frozenset({"tokens"}), None, read.length, Resizing(), (), (), words=read.tokenizer)


def _of_open_clip(path: Path, checkpoint: str, model: str | None) -> Subject:
    read = read_checkpoint(path, model)
    preprocessing = get_model_preprocess_cfg(read.model)
    size, resizing = _squared(preprocessing, checkpoint, "measure this one with clip_benchmark")
    mean, std = _of_channels(preprocessing)
    takes = frozenset({"pictures", "texts"})
    return Subject(read.model, takes, make_tokenizer(read.config), size, resizing, mean, std)


def _of_timm(path: Path, checkpoint: str, model: str | None) -> Subject:
    read = read_timm(path, model)
    size, resizing = _squared(read.seen, checkpoint, "give its config.json another pretrained_cfg")
    mean, std = _of_channels(read.seen)
    try:
        with torch.inference_mode():
            features = image_features(read.model.eval(), torch.zeros(1, 3, size, size))
        problem = "" if features.ndim == 2 else f"its features have the shape {tuple(features.shape)}"
    except Exception as error:  # a timm model's own code, which was written for whatever it takes
        problem = str(error).partition("\n")[0]
    if problem:
        raise InputError("CHECKPOINT", checkpoint, f"a model that turns {size} × {size} pixels in red, green and blue "
                         "into features", f"measure another model ({problem})")  # fmt: skip
    classes = int(getattr(read.model, "num_classes", 0)) or None
    takes = frozenset({"pictures", "classes"}) if classes else frozenset({"pictures"})
    return Subject(read.model, takes, None, size, resizing, mean, std, classes)


def _squared(preprocessing: Json, checkpoint: str, fix: str) -> tuple[int, Resizing]:
    try:
        return squared(preprocessing)
    except ValueError as error:
        raise InputError("CHECKPOINT", f"{checkpoint}: {error}", SQUARED, fix) from None


def _of_channels(preprocessing: Json) -> tuple[tuple[float, ...], tuple[float, ...]]:
    found: Sequence[Any] = [preprocessing[name] for name in ("mean", "std")]
    return tuple(found[0]), tuple(found[1])
