"""The evaluators there are, by the `type` that an experiment gives: raychain's own, and those of installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from raychain.core.plugins import Plugins
from raychain.errors import InputError, nearest
from raychain.evaluators.evaluator import Evaluator
from raychain.schema.problems import Problem, ProblemsError, explain

_MODULE = "raychain.evaluators.builtin"
EVALUATORS: Plugins[type[Evaluator]] = Plugins(
    "raychain.evaluators",
    {
        "zero_shot": f"{_MODULE}:ZeroShot",
        "retrieval": f"{_MODULE}:Retrieval",
        "linear_probe": f"{_MODULE}:LinearProbe",
        "zero_shot_multilabel": f"{_MODULE}:ZeroShotMultilabel",
        "accuracy": f"{_MODULE}:Accuracy",
        "perplexity": f"{_MODULE}:Perplexity",
    },
)


def own() -> dict[str, type[Evaluator]]:
    """raychain's own evaluators."""
    return {name: EVALUATORS[name] for name in EVALUATORS.own}


def check_takes(named: Mapping[str, Evaluator], takes: frozenset[str], where: str) -> None:
    """InputError, which names the option `where`, for an evaluator of what a model does not turn into features."""
    for name, evaluator in named.items():
        if missing := evaluator.needs - takes:
            known = ", ".join(sorted(kind for kind, found in own().items() if found.needs <= takes))
            raise InputError(f"{where}.{name}.type", evaluator.type,
                             f"an evaluator of {' and '.join(sorted(takes))}: {known or 'none'}",
                             f"leave it out: the models have no {' or '.join(sorted(missing))}")  # fmt: skip


def make(name: str, value: Any) -> Evaluator:
    """The evaluator that an experiment calls `name`, from what it gives for it. Raises ProblemsError."""
    if isinstance(value, Evaluator):
        return value
    types = ", ".join(EVALUATORS)
    if not isinstance(value, Mapping):
        reserved = [key for key in ("every", "score", "zero_shot", "retrieval") if key != name]
        fix = nearest(str(name), reserved, f"{name}: {{type: …, data: …}}")
        allowed = f"a mapping with `type` ({types}); every, score, and addresses under zero_shot and retrieval"
        raise ProblemsError([Problem((), repr(value), allowed, fix)])
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in EVALUATORS:
        similar = nearest(str(kind), list(EVALUATORS), "name one of these") if kind is not None else f"add {name}.type"
        if kind is None and "type" in nearest(" ".join(k for k in value if k != "data"), ["type"], ""):
            similar = "did you mean type?"
        raise ProblemsError([Problem(("type",), "nothing" if kind is None else repr(kind), types, similar)])
    found = _load(kind)
    try:
        return found.model_validate(dict(value))
    except ValidationError as error:
        raise ProblemsError(explain(error, found)) from None


def _load(name: str) -> type[Evaluator]:
    """The class of that name. Raises ProblemsError where its package does not give one."""
    found: object = None
    try:
        found = EVALUATORS[name]
    except ValueError as error:
        allowed = f"an evaluator that can be imported ({error})"
    else:
        allowed = "a subclass of raychain.evaluators.Evaluator with metrics"
    if not isinstance(found, type) or not issubclass(found, Evaluator) or not getattr(found, "metrics", ()):
        raise ProblemsError([Problem(("type",), name, allowed, "mend the package that has it")])
    return found
