"""`raychain data tokenize`: text into files of token ids, with a tokeniser that there is or one trained on the text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash

from raychain.core.json import Json
from raychain.data.fetch import open_input
from raychain.data.health import Bad, tally
from raychain.data.texts import BIN, documents
from raychain.data.token_files import Note, known_kind
from raychain.data.token_rows import TOGETHER
from raychain.data.tokens import BYTES, END, FILE, Tokenizer, bytes_content, read_tokenizer, trained_content
from raychain.errors import InputError

TRAIN, HELD_OUT = "train", "held_out"


class Options(NamedTuple):
    """How text is made into tokens."""

    tokenizer: str = BYTES
    vocabulary: int | None = None
    """Tokens of a tokeniser that is trained on the text, in place of `tokenizer`."""
    end: str = END
    key: str = "text"
    held_out: float = 0.0
    """Share of the documents that is held out."""
    file_tokens: int = 2**27
    """Tokens of a file, but for the last document's."""


@dataclass
class _Writer:
    """Files of tokens, one after the other: NAME-00000.bin and so on, or NAME.bin alone."""

    folder: Path
    name: str
    tokenizer: Tokenizer
    most: int | None
    notes: list[Note] = field(default_factory=list)
    _file: BinaryIO | None = None
    _count: tuple[int, int, int] = (0, 0, 0)

    def add(self, ids: np.ndarray, text: str) -> None:
        """Adds a document and the end token."""
        if self._file is None:
            self._file = self._path.open("wb")
        end = np.array([self.tokenizer.end], self.tokenizer.dtype)
        self._file.write(ids.tobytes() + end.tobytes())
        tokens, texts, size = self._count
        self._count = (tokens + len(ids) + 1, texts + 1, size + len(text.encode()))
        if self.most and self._count[0] >= self.most:
            self.close()

    def close(self) -> None:
        """Writes the file's note; what comes next begins another file."""
        if self._file is None:
            return
        self._file.close()
        tokens, texts, size = self._count
        note = Note(tokens, str(self.tokenizer.dtype), self.tokenizer.digest, texts, size)
        Path(f"{self._path}.json").write_text(json.dumps(note._asdict(), indent=2) + "\n")
        self.notes.append(note)
        self._file, self._count = None, (0, 0, 0)

    @property
    def _path(self) -> Path:
        return self.folder / (f"{self.name}-{len(self.notes):05}.{BIN}" if self.most else f"{self.name}.{BIN}")


def tokenize(
    addresses: Sequence[str], out: str | Path, options: Options, on_progress: Callable[[int], None] = lambda _: None
) -> Json:
    """Writes `train-*.bin`, with a share of the documents held out `held_out.bin`, a JSON file beside each, and the
    `tokenizer.json` into the new folder `out`. Which documents are held out follows from their content.

    Raises InputError for wrong arguments and where there is no text, OSError for what cannot be read or written.
    """
    sources = [(address, known_kind(address, "TEXT")) for address in addresses]
    if tokens := [address for address, kind in sources if kind == BIN]:
        raise InputError("TEXT", tokens[0], "files of text", "leave the files of tokens out")
    folder = _new(Path(out).expanduser())
    bad: list[Bad] = []

    def texts(report: Callable[[Bad], None]) -> Iterator[str]:
        for address, kind in sources:
            with open_input(address) as file:
                yield from documents(file, kind, options.key, report)

    tokenizer = _tokenizer(folder, options, lambda: texts(lambda _: None))
    train = _Writer(folder, TRAIN, tokenizer, options.file_tokens)
    held = _Writer(folder, HELD_OUT, tokenizer, None)
    found, done = texts(bad.append), 0
    while together := list(itertools.islice(found, TOGETHER)):
        for text, ids in zip(together, tokenizer.ids(together), strict=True):
            (held if _share(text) < options.held_out else train).add(ids, text)
        done += len(together)
        on_progress(done)
    for writer in (train, held):
        writer.close()
    if not train.notes or (options.held_out and not held.notes):
        what = (
            "no text"
            if not done
            else f"{done} documents, of which none is {'trained on' if held.notes else 'held out'}"
        )
        raise InputError("TEXT", f"{what} ({tally(bad)})" if bad else what, "several documents with text",
                         f"give more, or name the text's key or column by --text (it is {options.key})")  # fmt: skip
    return {
        "folder": str(folder),
        "tokenizer": str(folder / FILE),
        "vocabulary": tokenizer.size,
        **{name: _summed(writer.notes) for name, writer in ((TRAIN, train), (HELD_OUT, held))},
        "bad": dict(tally(bad).counts),
    }


def _summed(notes: Sequence[Note]) -> dict[str, int]:
    return {
        "files": len(notes),
        "documents": sum(note.documents for note in notes),
        "tokens": sum(note.tokens for note in notes),
        "bytes": sum(note.bytes for note in notes),
    }


def _share(text: str) -> float:
    """A number from 0 to 1 that follows from the text."""
    return xxhash.xxh3_64_intdigest(text.encode()) / 2**64


def _new(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("--out", folder, "a new or empty folder", "give another folder, or remove this one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("--out", folder, f"a folder that can be made ({error})", "give another folder") from None
    return folder


def _tokenizer(folder: Path, options: Options, texts: Callable[[], Iterator[str]]) -> Tokenizer:
    """The tokeniser, whose file is in the folder from then on."""
    if options.vocabulary is not None:
        if options.tokenizer != BYTES or options.end != END:
            raise InputError("--vocabulary", options.vocabulary, "no --tokenizer and no --end beside it",
                             "either name a tokenizer, or have one trained")  # fmt: skip
        content = trained_content(texts(), options.vocabulary)
    elif options.tokenizer == BYTES:
        read_tokenizer(BYTES, options.end, "--tokenizer")
        (folder / FILE).write_text(bytes_content())
        return read_tokenizer(BYTES)
    else:
        content = read_tokenizer(options.tokenizer, options.end, "--tokenizer").content
    (folder / FILE).write_text(content)
    return read_tokenizer(str(folder / FILE), options.end, "--tokenizer")
