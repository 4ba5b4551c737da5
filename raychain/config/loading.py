"""Reads an experiment file with `--set` overrides; errors say where, what was given, what is allowed, how to fix."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raychain.config.experiment import Experiment
from raychain.core.json import Json
from raychain.core.storage import regular_file
from raychain.errors import InputError, nearest
from raychain.schema.problems import WHERE, explain
from raychain.schema.yaml_text import YamlError, read_yaml, read_yaml_file, shipped

_EXPONENT = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+")
SHOWN = 10
"""Problems of an experiment that are shown."""


def shipped_experiments() -> dict[str, Path]:
    """Name → file of the experiments that come with raychain (repository checkout or installed wheel)."""
    return shipped()


def find_experiment(name: str) -> Path:
    """The file for a path or a shipped experiment's name; InputError if there is none."""
    path, shipped = Path(name), shipped_experiments()
    if path.suffix in (".yaml", ".yml") or os.sep in name:
        try:
            regular_file(path)
        except OSError as error:
            allowed = "a YAML file, or one of: " + ", ".join(shipped)
            raise InputError("EXPERIMENT", name, allowed, f"check the path; {error.strerror or error}") from None
        return path
    if name not in shipped:
        fix = nearest(name, list(shipped), "give one of these names, or a path ending in .yaml")
        raise InputError("EXPERIMENT", name, ", ".join(shipped) or "a YAML file", fix)
    return shipped[name]


def load_experiment(name: str, overrides: Sequence[str] = ()) -> Experiment:
    """The validated experiment of a YAML path or shipped name, with `dotted.key=value` overrides (values are YAML)."""
    path = find_experiment(name)
    try:
        tree = read_yaml_file(path)
    except YamlError as error:
        where = f"{path}, line {error.line}" if error.line else str(path)
        raise InputError(where, str(error), "a YAML mapping of experiment keys", "correct the file there") from None
    except OSError as error:
        raise InputError("EXPERIMENT", name, "a file that can be read", str(error)) from None
    if not isinstance(tree, dict):
        given = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise InputError(str(path), given, "a YAML mapping of experiment keys", "see experiments/demo.yaml")
    for override in overrides:
        _apply(tree, override)
    return validate(tree, str(path))


def opened(experiment: str | Experiment, overrides: Sequence[str] = (), models: str | None = None) -> Experiment:
    """The experiment, read by its name unless it is one already, and its own models known to this process.

    `models` takes the place of the experiment's. Raises InputError.
    """
    from raychain.models.registry import use_models  # torch is not imported for --help

    config = experiment if isinstance(experiment, Experiment) else load_experiment(experiment, overrides)
    if models is not None:
        config = config.model_copy(update={"models": models})
    use_models(config.models, "models" if models is None else "--models")
    return with_generated(config)


def with_generated(config: Experiment) -> Experiment:
    """The experiment, and the models that it has made known to this process; they are its family where it has neither
    a family nor a chain. Raises InputError.
    """
    from raychain.paradigms.generating import generated_models

    made = [generated_models(config.task, generate, "generate") for generate in config.generate]
    for generate in config.search.space.generate if config.search else ():
        generated_models(config.task, generate, "search.space.generate")
    if made and not config.chain and not config.family:
        return config.model_copy(update={"family": tuple(dict.fromkeys(itertools.chain(*made)))})
    return config


def validate(tree: Json, source: str = "experiment") -> Experiment:
    """An Experiment from plain data; InputError with every problem in it."""
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise _explained(error, source) from None


def _apply(tree: Json, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError("--set", override, "dotted.key=value", "for example --set train.lr=5e-4")
    try:
        value = read_yaml(text)
    except YamlError as error:
        raise InputError(f"--set {key}", text, f"a YAML value ({error})", "quote the value") from None
    if isinstance(value, str) and _EXPONENT.fullmatch(value):  # YAML 1.1 reads 1e-3 as text
        value = float(value)
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[_index(node, part, override)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise InputError("--set", override, f"a key below a mapping; {part} is a value", f"set {part} itself")
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _index(node: list[Any], part: str, override: str) -> int:
    if part in map(str, range(len(node))):
        return int(part)
    allowed = f"a number from 0 to {len(node) - 1} in place of {part}" if node else f"no {part} of an empty list"
    raise InputError("--set", override, allowed, "count from 0")


def _explained(error: ValidationError, source: str) -> InputError:
    problems = []
    for problem in explain(error, Experiment):
        where = ".".join(map(str, problem.where))
        fix = problem.fix.replace(WHERE, where or "the file")
        problems.append(InputError(f"{source}: {where}", problem.given, problem.allowed, fix))
    first, *more = problems[:SHOWN]
    if (left := len(problems) - SHOWN) > 0:
        more.append(InputError(source, f"{left} more of the kind", "keys and values as above", "correct these first"))
    return InputError(*first.args, *more)
