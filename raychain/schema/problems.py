"""What is wrong with plain data that a component does not take, one problem at a time."""

from __future__ import annotations

from collections.abc import Sequence
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError

from raychain.errors import nearest

WHERE = "<where>"
"""Stands in a fix for the whole path, which is known once all components around the problem are."""


class Problem(NamedTuple):
    """The four parts of an InputError; `where` is the path from the component that was read."""

    where: tuple[str | int, ...]
    given: str
    allowed: str
    fix: str


class ProblemsError(ValueError):
    """Raised by a validator that knows more than pydantic's message: problems below the field that it validates."""

    def __init__(self, found: Sequence[Problem]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, p.where))}: {p.allowed}" for p in found))
        self.found = tuple(found)


def explain(error: ValidationError, component: type[BaseModel]) -> list[Problem]:
    """The problems in `error`, which reading a `component` raised. The field `named` is a mapping that users write
    without its name (see `config.evaluate`), so it stands in no path.
    """
    found: list[Problem] = []
    for item in error.errors():
        parts = tuple(p for p in item["loc"] if isinstance(p, str | int) and p != "named")
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ProblemsError):
            found += [p._replace(where=parts + p.where) for p in inner.found]
        elif item["type"] == "extra_forbidden":
            fields = _fields(component, parts[:-1])
            fix = nearest(str(parts[-1]), fields, "remove the key")
            found.append(Problem(parts, repr(item["input"]), ", ".join(fields), fix))
        elif item["type"] == "missing":
            found.append(Problem(parts, "nothing", "this key is required", f"add {WHERE}: …"))
        else:
            given = "…" if isinstance(item["input"], dict) and len(item["input"]) > 4 else repr(item["input"])
            given = "nothing" if given == "()" else given
            allowed = item["msg"].removeprefix("Value error, ").removeprefix("allowed is ").replace("tuple", "list")
            found.append(Problem(parts, given, allowed, f"correct {WHERE}"))
    return found


def _fields(component: type[BaseModel], parts: Sequence[str | int]) -> list[str]:
    """Field names of the component that `parts` (a pydantic location) leads to."""
    model: Any = component
    for part in parts:
        if isinstance(part, str) and isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(part)
            model = _component(field.annotation) if field else None
    return list(model.model_fields) if model is not None else []


def _component(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not get_origin(annotation) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is not None or isinstance(annotation, UnionType):
        return next((found for arg in get_args(annotation) if (found := _component(arg))), None)
    return None
