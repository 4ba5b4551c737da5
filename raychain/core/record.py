"""Records: JSON files that are read and written through a pydantic model.

Another version, a person or a damaged disk may have written a file, so each is checked against its model: a field of
another kind counts as absent, and a file without a field that it needs holds no record. Fields that the model does not
know are kept, so that what is written again stays as it was. A file of a version that is newer than the model's is
refused.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import operator
import os
from functools import cache
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pyarrow import fs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raychain.core.json import Json, plain
from raychain.core.storage import Folder
from raychain.errors import InputError

log = logging.getLogger("raychain.records")

DEEPEST = 64
"""Levels of a record; its own have a quarter of that."""
NEWEST = 9999
"""No version is higher; what is higher is none."""

NAMED = 3
"""Places of a record that a warning names."""

Version = Annotated[int, Field(ge=1, le=NEWEST)]


class Record(BaseModel):
    """A JSON object with at least these fields; none is converted, and others may stand beside them."""

    model_config = ConfigDict(strict=True, extra="allow", validate_by_name=True, validate_by_alias=True)

    @classmethod
    def of(cls, value: Json) -> Self:
        """The record of a JSON object. Raises pydantic.ValidationError."""
        known = _names(cls)
        found = cls.model_validate({name: field for name, field in value.items() if name in known})
        if found.model_extra is not None:  # the names of other fields may be anything that JSON allows
            found.model_extra.update({name: field for name, field in value.items() if name not in known})
        return found

    def content(self) -> Json:
        """The JSON object: the fields that were given, and those that the model does not know."""
        fields = type(self).model_fields.items()
        given = {field.alias or name: getattr(self, name) for name, field in fields if name in self.model_fields_set}
        found: Json = _json(given | (self.model_extra or {}))
        return found

    def document(self) -> bytes:
        """The file."""
        return (json.dumps(self.content(), indent=2, allow_nan=False) + "\n").encode()


class Versioned(Record):
    """A record whose file names its version; one that names none is of the version in `version`'s default."""

    SCHEMA: ClassVar[int] = 1
    """The newest version that is known."""
    version: Version = Field(default=1, alias="schema")

    def content(self) -> Json:
        """The content of the record, the version first."""
        return {"schema": self.version} | super().content()


Kind = TypeVar("Kind", bound=Record)


def read(folder: Folder, name: str, kind: type[Kind], *, quiet: bool = False) -> Kind | None:
    """The record in a file; None where there is none, or none that can be used, of which a warning tells.

    Raises OSError where the folder cannot be read, InputError where a newer version wrote the file.
    """
    record, problem = examine(folder, name, kind)
    if problem and not quiet:
        warn(f"{name} in {folder.address} {problem}")
    return record


def take(folder: Folder, name: str, kind: type[Kind]) -> Kind | None:
    """The record that `read` gives, for who writes the file next: one that cannot be used is kept beside it."""
    record, problem = examine(folder, name, kind)
    if problem and record is None:
        problem += f"; kept as {set_aside(folder, name)}"
    if problem:
        warn(f"{name} in {folder.address} {problem}")
    return record


def show(folder: Folder, name: str, kind: type[Kind]) -> Kind | None:
    """The part of the record in a file that can be shown to people, for who never writes it again; None where there is
    none, or not even what every such record has.

    What is of another kind than it should be is left out alone, however deep it stands, and a warning names it. Raises
    OSError where the folder cannot be read, InputError where a newer version wrote the file.
    """
    value = document(content(folder, name) or b"null")
    if issubclass(kind, Versioned):
        _refuse_newer(value, kind.SCHEMA, name, folder)
    record, wrong = salvage(value, kind)
    if wrong:
        more = f" and {len(wrong) - NAMED} others" if len(wrong) > NAMED else ""
        named = ", ".join(map(repr, wrong[:NAMED])) + more
        warn(f"{name} in {folder.address} has something else than it should in {named}, which is not shown")
    return record


def write(folder: Folder, name: str, record: Record) -> None:
    """Writes the record's file. Raises OSError."""
    folder.write(name, record.document())


def set_aside(folder: Folder, name: str) -> str:
    """Moves what stands at `name` to the first free `<name>.damaged-N`, which is returned. Raises OSError."""
    parent, _, base = name.rpartition("/")
    taken = set(folder.list(parent))
    free = next(new for n in range(1, len(taken) + 2) if (new := f"{base}.damaged-{n}") not in taken)
    folder.fs.move(folder.join(name), folder.join(f"{parent}/{free}" if parent else free))
    return free


def document(content: bytes) -> Any:
    """What the JSON says; None where it is none, or is nested too deep for a record."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    level, depth = [found], 0
    while level and depth <= DEEPEST:
        level = [inner for value in level for inner in _inner(value)]
        depth += 1
    return None if level else found


def parse(content: bytes, kind: type[Kind]) -> Kind | None:
    """The record that the JSON says; None where it is none."""
    return clean(document(content), kind)[0]


def clean(value: Any, kind: type[Kind]) -> tuple[Kind | None, list[str]]:
    """A record without its fields of a wrong kind, and their names; None where one of them is needed."""
    if not isinstance(value, dict):
        return None, []
    try:
        return kind.of(value), []
    except ValidationError as error:
        wrong = list(dict.fromkeys(str(problem["loc"][0]) for problem in error.errors(include_url=False)))
    known = _names(kind)
    if any(known[name] for name in wrong):
        return None, wrong
    return kind.of({name: field for name, field in value.items() if name not in wrong}), wrong


def salvage(value: Any, kind: type[Kind]) -> tuple[Kind | None, list[str]]:
    """A record without what has a wrong kind, and where that stood; None where nothing is left of it.

    An object that lacks what it needs is left out as a whole.
    """
    value = copy.deepcopy(value)
    lost: list[str] = []
    while isinstance(value, dict):
        try:
            return kind.of(value), lost
        except ValidationError as error:
            wrong = {_place(value, problem["loc"]) for problem in error.errors(include_url=False, include_input=False)}
        outermost = [place for place in wrong if not any(place[:n] in wrong for n in range(len(place)))]
        if () in wrong:
            break
        for *before, last in sorted(outermost, key=lambda place: [f"{part:>20}" for part in place], reverse=True):
            holder = functools.reduce(operator.getitem, before, value)
            del holder[last]
            lost.append(".".join(map(str, (*before, last))))
    return None, lost


def _place(value: Any, where: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The part of pydantic's `loc` that exists: after it come the kinds that were tried, or a field that is missing."""
    found: list[int | str] = []
    for part in where:
        if not (part in value if isinstance(value, dict) else isinstance(value, list) and part in range(len(value))):
            break
        value = value[part]
        found.append(part)
    return tuple(found)


def is_a(value: Any, kind: type[Kind]) -> bool:
    """Whether all its fields are of their kinds."""
    found, wrong = clean(value, kind)
    return found is not None and not wrong


def is_taken(folder: Folder, name: str) -> bool:
    """Whether anything has the name, a link that leads nowhere too."""
    return folder.exists(name) or (folder.local and os.path.lexists(folder.join(name)))


def content(folder: Folder, name: str) -> bytes | None:
    """What a file holds; None where there is none, or where something else than a file has its name."""
    if folder.fs.get_file_info(folder.join(name)).type != fs.FileType.File:
        return None
    return folder.read(name)


def examine(folder: Folder, name: str, kind: type[Kind]) -> tuple[Kind | None, str]:
    """The record that `read` gives, with what is wrong with it; nothing where there is no file."""
    found = content(folder, name)
    if found is None:
        return None, "is no file" if is_taken(folder, name) else ""
    value = document(found)
    if value is None:
        return None, "is not JSON, or nested too deep"
    if issubclass(kind, Versioned):
        _refuse_newer(value, kind.SCHEMA, name, folder)
    record, wrong = clean(value, kind)
    if record is None:
        return None, f"names no {' and no '.join(wrong)}" if wrong else "is no JSON object"
    return record, f"has something else than it should in {', '.join(map(repr, wrong))}" if wrong else ""


def _refuse_newer(value: Any, known: int, name: str, folder: Folder) -> None:
    """InputError for a JSON object of a version that is not known yet."""
    version = value.get("schema") if isinstance(value, dict) else None
    if isinstance(version, int) and known < version <= NEWEST:
        raise InputError(
            f"{name} in {folder.address}", f"schema {version}, which a newer raychain wrote",
            f"schema {known}" if known == 1 else f"schema 1 to {known}",
            "use that version of raychain here, or another folder (--out, storage)",
        )  # fmt: skip


def _names(kind: type[Record]) -> dict[str, bool]:
    """The names of a record's fields as its file has them, and whether each is needed."""
    return {field.alias or name: field.is_required() for name, field in kind.model_fields.items()}


def _json(value: Any) -> Any:
    """`plain`, with the content of records."""
    match value:
        case Record():
            return value.content()
        case dict():
            return {str(key): _json(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_json(inner) for inner in value]
    return plain(value)


def _inner(value: Any) -> list[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in values if isinstance(inner, dict | list)]


@cache
def warn(message: str) -> None:
    """Logs it once a process, as several readers may meet the same record."""
    log.warning("%s", message)
