"""Rows of CSV, TSV, parquet and JSONL files: each is read right, or says what is wrong with it, or ends the reading."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyarrow import fs, parquet

from raychain.core.json import Json
from raychain.core.storage import regular_file, resolve
from raychain.data.fetch import patiently
from raychain.errors import InputError

FORMATS = ("csv", "tsv", "parquet", "jsonl", "ndjson")
HEADERLESS = ("caption", "url")
"""Columns of a TSV without a header, such as CC3M's."""
LONGEST = 2**24
"""Characters of a line, and of a cell that spans several."""
WHERE = "TABLE"
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_ADDRESS = re.compile(r"(?i)(?:https?|s3|gs)://\S+|/\S+|.+\.(?:jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic|jp2|jxl)")


class Row(NamedTuple):
    """The values of a row by column; with a `problem` they are not to be used."""

    values: Mapping[str, Any]
    problem: str = ""
    lines: int = 1
    """Lines of the file that it takes."""


@dataclass(frozen=True)
class Layout:
    """How a table is written."""

    address: str
    kind: str
    """One of FORMATS."""
    names: tuple[str, ...]
    """Names of the columns, in order; none for a file without a row."""
    delimiter: str = ","
    quoted: bool = True
    """Whether quotes hold cells together. They do not in a TSV that was written without quoting, as most are."""
    header: bool = True


def layout_of(address: str) -> Layout:
    """The layout of the table at `address`; of a TSV with quotes the whole file is read for it.

    Raises InputError for another ending, OSError, ValueError or csv.Error for a file that cannot be read.
    """
    kind = resolve(address)[1].lower().removesuffix(".gz").rpartition(".")[2]
    match kind:
        case "parquet":
            with _binary(address) as file:
                return Layout(address, kind, tuple(parquet.ParquetFile(file).schema_arrow.names))
        case "jsonl" | "ndjson":
            first = next(_json_rows(address), None)
            return Layout(address, kind, tuple(first.values) if first else ())
        case "csv" | "tsv":
            return _separated_layout(address, kind)
    fix = "give the file one of these endings"
    raise InputError(WHERE, address, f"a file that ends in {', '.join(FORMATS)} (also .gz)", fix)


def rows_of(layout: Layout, columns: Sequence[str]) -> Iterator[Row]:
    """All rows in order, with the values of `columns`, of which the first names the picture.

    Raises OSError, ValueError or csv.Error, which say where, for a place from which reading cannot go on.
    """
    if layout.kind == "parquet":
        with _binary(layout.address) as file:
            for batch in parquet.ParquetFile(file).iter_batches(1024, columns=list(dict.fromkeys(columns))):
                yield from map(Row, batch.to_pylist())
    elif layout.kind in ("csv", "tsv"):
        yield from _separated_rows(layout, layout.names.index(columns[0]))
    else:
        yield from _json_rows(layout.address)


class _Lines:
    """The lines of a text file, which are counted and not endless."""

    def __init__(self, address: str) -> None:
        with _stream(address) as file:
            start = file.read(2)
        self.encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        self.number = 0
        self._file = io.TextIOWrapper(_stream(address), self.encoding, "surrogateescape", newline="")

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(LONGEST + 1):
            self.number += 1
            if len(line) > LONGEST:
                raise ValueError(f"line {self.number} has more than {LONGEST:,} characters")
            if not line.isascii() and _NOT_UTF8.search(line):
                raise ValueError(f"line {self.number} is not UTF-8: convert the file, or that line")
            yield line


def _stream(address: str) -> Any:
    filesystem, path = _resolved(address)
    return patiently(address, lambda: filesystem.open_input_stream(path))


def _binary(address: str) -> Any:
    filesystem, path = _resolved(address)
    return patiently(address, lambda: filesystem.open_input_file(path))


def _resolved(address: str) -> tuple[fs.FileSystem, str]:
    filesystem, path = resolve(address)
    if isinstance(filesystem, fs.LocalFileSystem):
        regular_file(path)
    return filesystem, path


def _json_rows(address: str) -> Iterator[Row]:
    twice: list[str] = []

    def checked(pairs: list[tuple[str, Any]]) -> Json:
        made = dict(pairs)
        twice[:] = [] if len(made) == len(pairs) else [key for key, _ in pairs]  # the outermost object comes last
        return made

    with _Lines(address) as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                values = json.loads(line, object_pairs_hook=checked)
            except ValueError as error:
                raise ValueError(f"line {lines.number}: {error}") from None
            except RecursionError:
                raise ValueError(f"line {lines.number} is nested too deeply") from None
            if not isinstance(values, dict):
                raise ValueError(f"line {lines.number} is no JSON object")
            if twice:
                key = next(key for key in twice if twice.count(key) > 1)
                raise ValueError(f"line {lines.number}: the key {key!r} stands twice")
            yield Row(values)


def _separated_layout(address: str, kind: str) -> Layout:
    """A .csv with tabs in its first line is one with tabs (open_clip's default)."""
    with _Lines(address) as lines:
        first = next((line for line in lines if line.strip("\r\n")), "")
        if kind == "csv" and "\t" not in first:
            names = next(_cells(lines, ",", first), [])
            return Layout(address, kind, tuple(names))
    names = _split(first, "\t")
    if len(names) == len(HEADERLESS) and _is_url(names[1]):
        return Layout(address, kind, HEADERLESS, "\t", quoted=False, header=False)
    if not first:
        return Layout(address, kind, ())
    quoted = all(map(_QUOTED.fullmatch, names)) or _quoted(address, len(names))
    return Layout(address, kind, tuple(map(_unquoted, names)) if quoted else tuple(names), "\t", quoted)


def _quoted(address: str, width: int) -> bool:
    """Whether quotes hold cells of a TSV together.

    They do where every cell with quotes is enclosed in them. Otherwise a line is a row and a quote a quote, unless rows
    that span lines, with every quote closed, leave fewer rows that do not have a cell for each column.
    """
    ragged, quotes, enclosed = 0, False, True
    with _Lines(address) as lines:
        for line in lines:
            cells = _split(line, "\t")
            ragged += not (_fits(cells, width) or _blank(cells))
            if '"' in line:
                quotes = True
                enclosed = enclosed and all(_QUOTED.fullmatch(cell) for cell in cells if '"' in cell)
    if not quotes or enclosed or not ragged:
        return quotes and enclosed
    try:
        with _Lines(address) as lines:
            return sum(not (_fits(cells, width) or _blank(cells)) for cells in _cells(lines, "\t")) < ragged
    except csv.Error:
        return False


def _separated_rows(layout: Layout, image: int) -> Iterator[Row]:
    width, names, before = len(layout.names), layout.names, 0
    with _Lines(layout.address) as lines:
        rows = _cells(lines, layout.delimiter) if layout.quoted else (_split(line, layout.delimiter) for line in lines)
        header = layout.header
        try:
            for cells in rows:
                taken, before = lines.number - before, lines.number
                if _blank(cells):
                    continue
                if header:
                    header = False
                    continue
                problem = "" if _fits(cells, width) else f"{len(cells)} cells in a table of {width} columns"
                if taken > 1 and (found := _swallowed(cells, layout.delimiter, width, image)):
                    said = f"a quote opens after line {before - taken} and closes in line {before}, around what looks"
                    raise ValueError(f"{said} like a row of its own ({found[:80]}): close it, or double it")
                yield Row(dict(zip(names, cells, strict=False)), problem, taken)
        except csv.Error as error:
            raise ValueError(f"line {before + 1} to {lines.number}: {error}; a quote in a cell is doubled") from None


def _cells(lines: _Lines, delimiter: str, first: str = "") -> Iterator[list[str]]:
    """Cells of each row, with quotes."""
    csv.field_size_limit(LONGEST)
    given: Iterable[str] = _after(first, lines) if first else lines
    return csv.reader(given, delimiter=delimiter, strict=True)


def _after(first: str, lines: Iterable[str]) -> Iterator[str]:
    yield first
    yield from lines


def _split(line: str, delimiter: str) -> list[str]:
    """Cells of a line without quotes."""
    return line.rstrip("\r\n").split(delimiter)


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if _QUOTED.fullmatch(cell) else cell


def _blank(cells: Sequence[str]) -> bool:
    return len(cells) < 2 and not any(cells)


def _fits(cells: Sequence[str], width: int) -> bool:
    """Whether there is a cell for each column, and none beyond but empty ones."""
    return len(cells) >= width and not any(cells[width:])


def _swallowed(cells: Sequence[str], delimiter: str, width: int, image: int) -> str:
    """A line within a cell that looks like a row: as many cells, of which that of the picture is an address."""
    for cell in cells:
        for line in cell.splitlines()[1:]:
            inner = _split(line, delimiter)
            if len(inner) == width and _ADDRESS.fullmatch(inner[image].strip()):
                return line
    return ""


def _is_url(text: str) -> bool:
    return text.strip().lower().startswith(("http://", "https://"))
