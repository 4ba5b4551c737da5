"""Tables of pictures and captions: CSV, TSV, parquet and JSONL, in the columns of the usual data sets."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import pyarrow as pa

from raychain.data.members import Wanted
from raychain.dataprep.rows import FORMATS, WHERE, Layout, Row, layout_of, rows_of
from raychain.errors import InputError, nearest

IMAGE_COLUMNS = ("url", "image_url", "path", "filepath", "image_path", "file", "image", "filename", "file_name")
"""Recognised in any case, the first that the table has: CC3M, img2dataset, open_clip, plain."""
CAPTION_COLUMNS = ("caption", "text", "title", "captions")
LONGEST_CAPTION = 2**20
"""Characters; what is longer is no caption."""
T = TypeVar("T")


class Entry(NamedTuple):
    """A row: the picture's address as it stands there, "" if it has none, and its captions."""

    image: str
    captions: tuple[str, ...]
    problem: str = ""
    """Why the row cannot be used, if the table itself tells."""
    lines: int = 1
    """Lines of the table that it takes."""
    label: int | None = None
    """The picture's class, where pictures have classes and no captions."""


@dataclass(frozen=True)
class PictureTable:
    """A table with its columns chosen."""

    layout: Layout
    image: str
    captions: tuple[str, ...]
    wanted: Wanted = Wanted(("txt",))  # noqa: RUF009 - frozen
    """What its shards hold."""

    @property
    def folder(self) -> str:
        """Where relative paths of pictures start."""
        address = self.layout.address
        return address.rpartition("/")[0] or ("/" if address.startswith("/") else ".")

    def entries(self) -> Iterator[Entry]:
        """All rows in order. Raises InputError, naming the place, where the file cannot be read."""
        rows = rows_of(self.layout, (self.image, *self.captions))
        while (row := _guarded(self.layout.address, partial(next, rows, None))) is not None:
            yield self._entry(row)

    def _entry(self, row: Row) -> Entry:
        image, captions = row.values.get(self.image), _captions(row, self.captions)
        image = image.strip() if isinstance(image, str) else ""
        problem = row.problem
        if any("\0" in text for text in (image, *captions)):
            problem = problem or "a NUL character"
        if any(len(text) > LONGEST_CAPTION for text in (image, *captions)):
            problem = problem or f"a caption of more than {LONGEST_CAPTION:,} characters"
        return Entry(image, captions, problem, row.lines)


def open_table(address: str, image: str | None = None, captions: Sequence[str] = ()) -> PictureTable:
    """The table at `address` with its columns, recognised where they are not named.

    Raises InputError for a file that is not there, of another format, or without such columns.
    """
    layout = _guarded(address, partial(layout_of, address))
    names = layout.names
    for option, given in (("--image-column", image), *(("--caption-column", name) for name in captions)):
        if given is not None and names and given not in names:
            raise InputError(option, given, ", ".join(names), nearest(given, names, "name one of these columns"))
    if not names:
        raise InputError(WHERE, address, "a table with at least one row", "check the file")
    image = image or _recognised(names, IMAGE_COLUMNS, "--image-column")
    chosen = tuple(captions) or (_recognised(names, CAPTION_COLUMNS, "--caption-column"),)
    for name in (image, *chosen):
        if names.count(name) > 1:
            raise InputError(WHERE, f"{names.count(name)} columns {name}", "one column of a name", "rename the others")
    first = _guarded(address, partial(next, rows_of(layout, (image, *chosen)), None))
    if first is None:
        raise InputError(WHERE, address, "a table with at least one row", "check the file")
    if not isinstance(first.values.get(image), str | None):
        held = type(first.values[image]).__name__
        raise InputError("--image-column", f"{image}, which holds {held}", "paths or URLs", "name another column")
    return PictureTable(layout, image, chosen)


def _recognised(names: Sequence[str], known: Sequence[str], option: str) -> str:
    lower = {name.lower(): name for name in reversed(names)}
    for name in known:
        if name in lower:
            return lower[name]
    raise InputError(WHERE, f"columns {', '.join(names)}", f"one of {', '.join(known)}", f"name the column: {option}")


def _captions(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    found: list[str] = []
    for column in columns:
        value = row.values.get(column)
        found += [text.strip() for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    return tuple(dict.fromkeys(text for text in found if text))


def _guarded(address: str, action: Callable[[], T]) -> T:
    """What `action` returns. Raises InputError, naming the place, where the file cannot be read."""
    try:
        return action()
    except (OSError, ValueError, ArithmeticError, csv.Error, pa.ArrowException) as error:
        raise InputError(WHERE, address, f"a readable table ({', '.join(FORMATS)})", str(error)) from None
