"""What a user may write under `evaluate:`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    PlainValidator,
    SerializationInfo,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from raychain.core.json import Json
from raychain.errors import InputError, nearest
from raychain.evaluators import registry
from raychain.evaluators.evaluator import Evaluator
from raychain.evaluators.metrics import Definition, define, find
from raychain.schema.component import Component
from raychain.schema.durations import Every
from raychain.schema.problems import Problem, ProblemsError
from raychain.schema.yaml_text import YamlError, read_yaml_file, shipped

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHORT = ("zero_shot", "retrieval")
"""Names whose value may be the data alone, of an evaluator of that type."""


def _named(value: Mapping[str, Any]) -> dict[str, Evaluator]:
    found, problems = {}, []
    for name, given in value.items():
        short = name in _SHORT and isinstance(given, str | list | tuple)
        try:
            if not _NAME.fullmatch(str(name)):
                allowed = "a name of letters, digits, dots, hyphens and underscores"
                raise ProblemsError([Problem((), repr(name), allowed, "give the evaluator another name")])
            found[name] = registry.make(name, {"type": name, "data": given} if short else given)
        except ProblemsError as error:
            for problem in error.found:
                where = () if short and problem.where[:1] == ("data",) else problem.where
                problems.append(problem._replace(where=(name, *where)))
    if problems:
        raise ProblemsError(problems)
    return found


def evaluation_files() -> dict[str, Path]:
    """Name → file of the lists of evaluators that come with raychain."""
    return shipped("evaluation")


def _of_file(name: str, root: str | None) -> Json:
    """The evaluators, as a user writes them, of a YAML file or of one that comes with raychain."""
    known = evaluation_files()
    path = known.get(name, Path(name))
    allowed = f"a YAML file of evaluators by name, or one of: {', '.join(known)}"
    try:
        tree = read_yaml_file(path)
    except OSError as error:
        fix = nearest(name, list(known), f"check the path; {error.strerror or error}")
        raise ProblemsError([Problem(("file",), name, allowed, fix)]) from None
    except YamlError as error:
        raise ProblemsError([Problem(("file",), f"{name}: {error}", allowed, "correct the file")]) from None
    if not isinstance(tree, dict):
        raise ProblemsError([Problem(("file",), name, allowed, "see experiments/evaluation/vtab-plus.yaml")])
    found = {str(key): _rooted(value, root) for key, value in tree.items()}
    if root is None and found != {str(key): _rooted(value, "") for key, value in tree.items()}:
        raise ProblemsError([Problem(("root",), "nothing", "a folder or address, for {root} in the file's addresses",
                                     "give where the data lies")])  # fmt: skip
    return found


def _rooted(value: Any, root: str | None) -> Any:
    """A part of the file with the address `root` in place of `{root}`."""
    if isinstance(value, str):
        return value if root is None else value.replace("{root}", root.rstrip("/"))
    if isinstance(value, list):
        return [_rooted(part, root) for part in value]
    return {key: _rooted(part, root) for key, part in value.items()} if isinstance(value, dict) else value


class Evaluate(Component):
    """Measured on held-out data after each stage: any number of evaluators by name, such as
    `imagenet: {type: zero_shot, data: data/imagenet}`. Their metrics are `imagenet/top1` and so on.

    Types: `zero_shot`, `retrieval` and those of installed packages (entry points `raychain.evaluators`); each one's
    options are the fields of its class in `raychain/evaluators/builtin.py`. `zero_shot: FOLDER` and
    `retrieval: SHARDS` are short for evaluators of that name, whose metrics are also called `zero_shot_top1`,
    `i2t_r1` and so on.

    `file: NAME` takes the evaluators of a YAML file, or of one in `experiments/evaluation`; `root: ADDRESS` stands for
    `{root}` in that file's addresses. Evaluators beside it are added, or take the place of those of the same name.
    """

    every: Every | None = None
    """Also measure during a stage: "1 epochs", "500 steps"; a grown stage then before its first step too."""
    score: str | None = None
    """The metric that a model is judged by, such as `imagenet/top1`. Absent: the first one of the first evaluator."""
    named: Annotated[dict[str, SerializeAsAny[Evaluator]], PlainValidator(_named)] = {}  # noqa: RUF012 - pydantic copies
    """The evaluators. A user writes them beside `every` and `score`, without this key."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or set(value) <= {"every", "score", "named"}:
            return value
        file, root = value.get("file"), value.get("root")
        if isinstance(file, str) and (root is None or isinstance(root, str)):
            others = {name: given for name, given in value.items() if name not in ("file", "root")}
            value = _of_file(file, root) | others
        sets = {name: given for name, given in value.items() if name not in ("every", "score") and given is not None}
        own = {name: given for name, given in value.items() if name in ("every", "score")}
        return own | {"named": dict(sorted(sets.items(), key=lambda item: item[0] != "zero_shot"))}

    @model_validator(mode="after")
    def _known_score(self) -> Evaluate:
        if self.score is not None:
            try:
                find(self.definitions, self.score, "score")
            except InputError as error:
                raise ProblemsError([Problem(("score",), *error.args[1:])]) from None
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> Json:
        plain = handler(self)
        found: Json = {} if info.exclude_unset else dict.fromkeys(_SHORT)
        for name, given in plain.pop("named", {}).items():
            short = name == given["type"] and {k for k, v in given.items() if v is not None} <= {"type", "data"}
            found[name] = given["data"] if short and name in _SHORT else given
        return found | {key: value for key, value in plain.items() if key != "score" or value is not None}

    @property
    def definitions(self) -> tuple[Definition, ...]:
        """Every metric that is measured, in the order of the evaluators."""
        return tuple(d for name, found in self.named.items() for d in define(name, found.type, found.metrics))

    @property
    def judged_by(self) -> Definition | None:
        """The metric that models are judged by; None where nothing is measured."""
        if self.score is not None:
            return find(self.definitions, self.score, "evaluate.score")
        return next(iter(self.definitions), None)
