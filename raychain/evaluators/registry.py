"""The evaluators there are, by the `type` that an experiment gives: raychain's own, and those of installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError

from raychain.errors import nearest
from raychain.evaluators.evaluator import Evaluator
from raychain.schema.problems import Problem, ProblemsError, explain

GROUP = "raychain.evaluators"
_MODULE = "raychain.evaluators.builtin"
OWN = {"zero_shot": f"{_MODULE}:ZeroShot", "retrieval": f"{_MODULE}:Retrieval",
       "linear_probe": f"{_MODULE}:LinearProbe"}  # fmt: skip


def available() -> dict[str, EntryPoint]:
    """Every evaluator by its type. A package cannot take the name of one of raychain's own."""
    own = {name: EntryPoint(name, target, GROUP) for name, target in OWN.items()}
    return {found.name: found for found in entry_points(group=GROUP)} | own


def own() -> dict[str, type[Evaluator]]:
    """raychain's own evaluators."""
    known = available()
    return {name: _load(known[name]) for name in OWN}


def make(name: str, value: Any) -> Evaluator:
    """The evaluator that an experiment calls `name`, from what it gives for it. Raises ProblemsError."""
    if isinstance(value, Evaluator):
        return value
    known = available()
    types = ", ".join(known)
    if not isinstance(value, Mapping):
        reserved = [key for key in ("every", "score", "zero_shot", "retrieval") if key != name]
        fix = nearest(str(name), reserved, f"{name}: {{type: …, data: …}}")
        allowed = f"a mapping with `type` ({types}); every, score, and addresses under zero_shot and retrieval"
        raise ProblemsError([Problem((), repr(value), allowed, fix)])
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in known:
        similar = nearest(str(kind), list(known), "name one of these") if kind is not None else f"add {name}.type"
        if kind is None and "type" in nearest(" ".join(k for k in value if k != "data"), ["type"], ""):
            similar = "did you mean type?"
        raise ProblemsError([Problem(("type",), "nothing" if kind is None else repr(kind), types, similar)])
    found = _load(known[kind])
    try:
        return found.model_validate(dict(value))
    except ValidationError as error:
        raise ProblemsError(explain(error, found)) from None


def _load(entry: EntryPoint) -> type[Evaluator]:
    """The class of an entry point. Raises ProblemsError where the package does not give one."""
    try:
        found = entry.load()
    except Exception as error:  # the package's own code runs here, which may raise anything
        found, allowed = None, f"an evaluator that can be imported ({type(error).__name__}: {error})"
    else:
        allowed = "a subclass of raychain.evaluators.Evaluator with metrics"
    if not isinstance(found, type) or not issubclass(found, Evaluator) or not getattr(found, "metrics", ()):
        raise ProblemsError([Problem(("type",), f"{entry.name} = {entry.value}", allowed, "mend that package")])
    return found
