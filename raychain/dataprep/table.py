"""Tables of pictures and captions: CSV, TSV, parquet and JSONL, in the columns of the usual data sets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import fs, parquet

from raychain.errors import InputError, nearest
from raychain.storage import resolve

IMAGE_COLUMNS = ("url", "image_url", "path", "filepath", "image_path", "file", "image", "filename", "file_name")
"""Recognised in any case, the first that the table has: CC3M, img2dataset, open_clip, plain."""
CAPTION_COLUMNS = ("caption", "text", "title", "captions")
HEADERLESS = ("caption", "url")
"""Columns of a TSV without a header, such as CC3M's."""
FORMATS = ("csv", "tsv", "parquet", "jsonl", "ndjson")
WHERE = "TABLE"


class Entry(NamedTuple):
    """A row: the picture's address as it stands there, "" if it has none, and its captions."""

    image: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class PictureTable:
    """A table with its columns chosen."""

    address: str
    image: str
    captions: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Where relative paths of pictures start."""
        return self.address.rpartition("/")[0] or ("/" if self.address.startswith("/") else ".")

    def entries(self) -> Iterator[Entry]:
        """All rows in order. Raises InputError, naming the place, where the file cannot be read."""
        for row in _guarded(self.address, _rows(self.address)):
            image = row.get(self.image)
            yield Entry(image.strip() if isinstance(image, str) else "", _captions(row, self.captions))


def open_table(address: str, image: str | None = None, captions: Sequence[str] = ()) -> PictureTable:
    """The table at `address` with its columns, recognised where they are not named.

    Raises InputError for a file that is not there, of another format, or without such columns.
    """
    first = next(_guarded(address, _rows(address)), None)
    if first is None:
        raise InputError(WHERE, address, "a table with at least one row", "check the file")
    names = list(first)
    for option, given in (("--image-column", image), *(("--caption-column", name) for name in captions)):
        if given is not None and given not in names:
            raise InputError(option, given, ", ".join(names), nearest(given, names, "name one of these columns"))
    image = image or _recognised(names, IMAGE_COLUMNS, "--image-column")
    if not isinstance(first[image], str | None):
        held = type(first[image]).__name__
        raise InputError("--image-column", f"{image}, which holds {held}", "paths or URLs", "name another column")
    return PictureTable(address, image, tuple(captions) or (_recognised(names, CAPTION_COLUMNS, "--caption-column"),))


def _recognised(names: Sequence[str], known: Sequence[str], option: str) -> str:
    lower = {name.lower(): name for name in reversed(names)}
    for name in known:
        if name in lower:
            return lower[name]
    raise InputError(WHERE, f"columns {', '.join(names)}", f"one of {', '.join(known)}", f"name the column: {option}")


def _captions(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    found: list[str] = []
    for column in columns:
        value = row.get(column)
        found += [text.strip() for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    return tuple(dict.fromkeys(text for text in found if text))


def _guarded(address: str, rows: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    try:
        yield from rows
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise InputError(WHERE, address, f"a readable table ({', '.join(FORMATS)})", str(error)) from None


def _rows(address: str) -> Iterator[Mapping[str, Any]]:
    filesystem, path = resolve(address)
    kind = path.lower().removesuffix(".gz").rpartition(".")[2]
    match kind:
        case "parquet":
            with filesystem.open_input_file(path) as file:
                for batch in parquet.ParquetFile(file).iter_batches(1024):
                    yield from batch.to_pylist()
        case "jsonl" | "ndjson":
            with _text(filesystem, path) as file:
                yield from _json_rows(file)
        case "csv" | "tsv":
            with _text(filesystem, path) as file:
                yield from _separated_rows(file, tabs=kind == "tsv")
        case _:
            fix = "give the file one of these endings"
            raise InputError(WHERE, address, f"a file that ends in {', '.join(FORMATS)} (also .gz)", fix)


def _text(filesystem: fs.FileSystem, path: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(filesystem.open_input_stream(path), "utf-8-sig", newline="")


def _json_rows(file: io.TextIOWrapper) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        yield row


def _separated_rows(file: io.TextIOWrapper, *, tabs: bool) -> Iterator[Mapping[str, Any]]:
    """Rows of a CSV or TSV. A .csv with tabs in its first line is one with tabs (open_clip's default)."""
    csv.field_size_limit(2**27)
    first = file.readline()
    tabs = tabs or "\t" in first
    cells = next(csv.reader([first], delimiter="\t" if tabs else ","), [])
    if tabs and len(cells) == len(HEADERLESS) and _is_url(cells[1]):
        # written without a library's quoting: a quote is a quote
        yield dict(zip(HEADERLESS, first.rstrip("\r\n").split("\t"), strict=True))
        for line in file:
            yield dict(zip(HEADERLESS, line.rstrip("\r\n").split("\t"), strict=False))
        return
    for row in csv.reader(file, delimiter="\t" if tabs else ","):
        if row:
            yield dict(zip(cells, row, strict=False))


def _is_url(text: str) -> bool:
    return text.strip().lower().startswith(("http://", "https://"))
