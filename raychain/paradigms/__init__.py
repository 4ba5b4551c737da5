"""Pre-training paradigms by name: raychain's own, and installed packages' (entry points `raychain.paradigms`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from pydantic import ValidationError

from raychain.core.plugins import Plugins
from raychain.errors import InputError, nearest
from raychain.paradigms.task import Task
from raychain.schema.problems import ProblemsError, explain

if TYPE_CHECKING:
    from raychain.paradigms.base import Config, Paradigm
    from raychain.planning.macs import ModelSize

PARADIGMS: Plugins[type[Paradigm]] = Plugins(
    "raychain.paradigms",
    {
        "clip": "raychain.paradigms.clip.paradigm:Clip",
        "siglip": "raychain.paradigms.siglip:SigLip",
        "classify": "raychain.paradigms.classify.paradigm:Classify",
        "lm": "raychain.paradigms.lm.paradigm:Language",
    },
)
"""The paradigms that `task.paradigm` may name."""


def make_task(value: object) -> Task:
    """The `task:` of an experiment from plain data: {`paradigm`: name, and that paradigm's options}.

    Raises ValueError for what is no such mapping and for unknown names, ProblemsError for wrong options.
    """
    if isinstance(value, Task):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("paradigm"), str):
        raise ValueError(f"allowed is {{paradigm: NAME}}, NAME one of {', '.join(PARADIGMS)}")
    name = value["paradigm"]
    if name not in PARADIGMS:
        hint = nearest(name, list(PARADIGMS), "is the package that has it installed?")
        raise ValueError(f"allowed is a paradigm of {', '.join(PARADIGMS)}; {name!r} is none: {hint}")
    options = PARADIGMS[name].options
    try:
        return options.model_validate(value)
    except ValidationError as error:
        raise ProblemsError(explain(error, options)) from None


def make_paradigm(task: Task) -> Paradigm:
    """The paradigm that an experiment's `task` names, with its options."""
    return PARADIGMS[task.paradigm](task)


def model_size(task: Task, model: str, size: int | None = None) -> ModelSize:
    """Parameters, MACs and activations of a model by name, at its own input size or at `size`.

    Raises UnknownModelError for an unknown name, ValueError for an input size that the model does not take.
    """
    paradigm = make_paradigm(task)
    config = paradigm.config(model)
    return _measured(task, model, json.dumps(config, sort_keys=True), size or paradigm.native_size(config))


def usable_size(task: Task, model: str, size: int | None, where: str) -> ModelSize:
    """`model_size` of a model that a user named at `where`. Raises InputError if it cannot be trained on inputs of that
    size, or not at all.
    """
    from raychain.models import UnknownModelError

    try:
        return model_size(task, model, size)
    except UnknownModelError as error:
        raise unknown_model(task, model, error, where) from None
    except ValueError as error:
        reason = str(error)
    paradigm = make_paradigm(task)
    own = paradigm.native_size(paradigm.config(model))
    if size is not None and size != own:
        try:
            model_size(task, model)
        except ValueError as error:
            reason = str(error)
        else:
            raise InputError("data.image_size", size, f"a size {model} takes, such as {own}", reason)
    allowed = "a model that can be built and run on the samples of this paradigm"
    raise InputError(where, model, allowed, f"give another model: {reason}")


def unknown_model(task: Task, model: str, error: Exception, where: str) -> InputError:
    """What to tell a user who named, at `where`, a model that is unknown or refused, as the error says."""
    described = json.dumps(task.model_dump(mode="json"))
    listed = f"python -c 'import raychain.paradigms as p; print(p.make_paradigm(p.make_task({described})).known())'"
    if task.paradigm == "clip":
        listed = "python -c 'import raychain.models as f; print(f.model_names())'"
    fix = nearest(model[:100], list(make_paradigm(task).known()), listed)
    return InputError(where, model if len(model) <= 100 else f"{model[:97]}...", str(error), fix)


def projects(task: Task, config: Config, teacher: Config, size: int) -> bool:
    """Whether a model of the configuration `config` follows one of `teacher` through a trained projector."""
    return _projects(task, *(json.dumps(found, sort_keys=True) for found in (config, teacher)), size)


@lru_cache(maxsize=256)
def _projects(task: Task, config: str, teacher: str, size: int) -> bool:
    paradigm, own = make_paradigm(task), json.loads(config)
    model = paradigm.build(own, size=size, seed=0, device="meta")
    projector = paradigm.objective(model, own, json.loads(teacher)).projector
    return projector is not None and any(True for _ in projector.parameters())


@lru_cache(maxsize=256)
def _measured(task: Task, model: str, config: str, size: int) -> ModelSize:
    return make_paradigm(task).measure(model, json.loads(config), size)
