"""Documents out of files: plain text, JSON lines, parquet tables, and tar files with texts in them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from raychain.core.storage import split_options
from raychain.data.health import TEXT, TRUNCATED, Bad
from raychain.data.tar import split_name, walk

BIN = "bin"
"""Kind of files that hold token ids."""
KINDS = {"txt": "txt", "md": "txt", "rst": "txt", "jsonl": "jsonl", "ndjson": "jsonl", "parquet": "parquet",
         "tar": "tar", "bin": BIN}  # fmt: skip
"""Kinds of files by the end of their name."""
Report = Callable[[Bad], None]
ROWS = 1024
NO_TEXT = "missing text"


def kind_of(address: str) -> str | None:
    """The kind of file that an address names; None for unknown ones."""
    return KINDS.get(split_options(address)[0].rpartition(".")[2].lower())


def documents(file: BinaryIO, kind: str, key: str, report: Report) -> Iterator[str]:
    """The texts of an open file, in their order. `key` names the text in JSON and in tables.

    `report` hears of what cannot be used. Raises OSError where the file cannot be read.
    """
    if kind == "txt":
        yield from _text("the file", file.read(), report)
    elif kind == "jsonl":
        lines = io.BufferedReader(cast(io.RawIOBase, file), 2**20)  # pyarrow's files have no lines
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from _json(f"line {number}", line, key, report)
        finally:
            lines.detach()  # or it would close the file
    elif kind == "parquet":
        yield from _table(file, key, report)
    else:
        for name, _, content in walk(file, lambda *found: report(Bad(*found))):
            extension = split_name(name)[1]
            if content and extension == "txt":
                yield from _text(name, content(), report)
            elif content and extension == "json":
                yield from _json(name, content(), key, lambda bad: report(bad) if bad.kind == TEXT else None)


def _text(name: str, content: bytes, report: Report) -> Iterator[str]:
    try:
        if text := content.decode():
            yield text
    except UnicodeDecodeError as error:
        report(Bad(TEXT, name, f"not UTF-8 at byte {error.start}"))


def _json(name: str, content: bytes, key: str, report: Report) -> Iterator[str]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        report(Bad(TEXT, name, str(error)))
        return
    text = found.get(key) if isinstance(found, dict) else None
    if isinstance(text, str) and text:
        yield from _text(name, text.encode(errors="replace"), report)
    else:
        report(Bad(NO_TEXT, name, f"no text under {key!r}"))


def _table(file: BinaryIO, key: str, report: Report) -> Iterator[str]:
    try:
        table: Any = pq.ParquetFile(file)
        if key not in table.schema_arrow.names:
            report(Bad(NO_TEXT, "the table", f"no column {key!r}, but {', '.join(table.schema_arrow.names)[:200]}"))
            return
        row = 0
        for batch in table.iter_batches(ROWS, columns=[key]):
            for text in batch.column(0).to_pylist():
                row += 1
                if isinstance(text, str) and text:
                    yield text
                else:
                    report(Bad(NO_TEXT, f"row {row}", f"no text under {key!r}"))
    except pa.ArrowException as error:
        report(Bad(TRUNCATED, "the table", str(error)))
