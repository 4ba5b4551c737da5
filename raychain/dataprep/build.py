"""Shards packed from a table, in img2dataset's layout: `{shard:05d}.tar` of `{row:09d}.jpg|png|webp`, `.json`, `.txt`.

Row r of the table is sample r whatever happens to the rows before it, so a build gives the same bytes with any number
of workers, and after any interruption. A shard is finished when its `_stats.json` is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from raychain import records
from raychain.core.json import Json
from raychain.core.storage import Folder, is_local
from raychain.data import pixels
from raychain.data.health import Unusable, picture
from raychain.data.members import Wanted
from raychain.data.pixels import Frame, check_range, framed, opened, rgb
from raychain.dataprep.fetch import FetchError, fetch
from raychain.dataprep.index import index_shards
from raychain.dataprep.table import Entry
from raychain.errors import InputError, without_secrets
from raychain.records import FailureRecord, PackedRecord

log = logging.getLogger("raychain.dataprep")
MARKER, FAILED = "build.json", "failed.jsonl"
FORMAT = 1
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's name of a format → member extension; pictures of other formats become JPEGs."""
QUALITY = 95
"""JPEG quality of pictures that are written anew."""
AHEAD = 2
"""Pictures a worker that are fetched before they can be written."""
LARGE = 2**24
"""Pixels of pictures that are decoded one at a time, for the memory they take."""
_LARGE = threading.Lock()


@dataclass(frozen=True)
class Options:
    """How pictures are fetched and packed."""

    samples_per_shard: int = 10_000
    image_size: int | None = None
    """Pixels of the shorter side of pictures that have more; None: the original bytes."""
    workers: int = 16
    timeout_s: float = 10.0
    retries: int = 3
    retry_failed: bool = False
    """Pack shards with failures again."""


class Pictures(Protocol):
    """What is packed: a table, or class folders."""

    @property
    def folder(self) -> str:
        """Where relative paths of pictures start."""

    @property
    def wanted(self) -> Wanted:
        """What a sample of the shards holds."""

    def entries(self) -> Iterator[Entry]:
        """All pictures in order."""


class Packed(NamedTuple):
    """A packed picture: member extension, content and size in pixels."""

    extension: str
    content: bytes
    width: int
    height: int


def build(
    table: Pictures,
    out: str,
    options: Options,
    on_progress: Callable[[int, int, int], None] = lambda *_: None,
) -> Json:
    """Packs the table into shards in `out`: {`folder`, `shards`, `rows`, `lines` (of the table, that the
    rows take), `samples`, `bytes`, `failed` (reason → rows)}.

    Shards that an earlier call finished are kept. `on_progress` hears (rows done, rows, failures) as it goes.
    Raises InputError, before anything is fetched, for a table that cannot be read and a folder with other content;
    OSError where the folder cannot be written.
    """
    rows, lines, digest = _measure(table)
    folder = _claim(out, {"format": FORMAT, "table": digest, "samples_per_shard": options.samples_per_shard,
                          "image_size": options.image_size})  # fmt: skip
    entries, done, failures = table.entries(), 0, 0
    stats = []
    with warnings.catch_warnings(), contextlib.closing(_Fetchers(table.folder, options)) as fetchers:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, and within Pillow's limit
        for shard, first in enumerate(range(0, rows, options.samples_per_shard)):
            part = list(islice(entries, options.samples_per_shard))
            kept = _finished(folder, shard, len(part), options.retry_failed)
            if kept is None:
                for packed in _pack(folder, shard, first, part, fetchers):
                    failures += packed is None
                    done += 1
                    on_progress(done, rows, failures)
                kept = _stats(folder, shard, len(part))
                if kept is None:
                    raise OSError(f"{_stats_name(shard)} is not what was written")
            else:
                done += len(part)
                failures += len(kept.failed)
            stats.append(kept)
    if stats:
        index_shards([folder.join(f"{shard:05d}.tar") for shard in range(len(stats))], table.wanted)
    failed = [row for shard in stats for row in shard.failed]
    folder.write(FAILED, "".join(json.dumps(row.content()) + "\n" for row in failed).encode())
    return {
        "folder": folder.path,
        "shards": len(stats),
        "rows": rows,
        "lines": lines,
        "samples": sum(shard.samples for shard in stats),
        "bytes": sum(shard.bytes for shard in stats),
        "failed": dict(Counter(row.reason for row in failed).most_common()),
    }


def pack_picture(encoded: bytes, size: int | None) -> Packed:
    """The picture as it goes into a shard: its own bytes, or a JPEG where it must shrink or has another format.

    Raises Unusable for a picture that cannot be decoded.
    """
    if not encoded:
        raise Unusable("empty picture")
    return picture(_pack_picture, encoded, size)


def _pack_picture(encoded: bytes, size: int | None) -> Packed:
    image = opened(encoded)
    large = _LARGE if image.width * image.height > LARGE else contextlib.nullcontext()
    with large:
        return _converted(image, encoded, size)


def _converted(image: Image.Image, encoded: bytes, size: int | None) -> Packed:
    extension, shrinks = EXTENSIONS.get(image.format or ""), size is not None and min(image.size) > size
    if extension and not shrinks:
        image.load()
        return Packed(extension, encoded, *image.size)
    check_range(image)
    scale = size / min(image.size) if size is not None and shrinks else 1
    width, height = (max(size or 1, round(side * scale)) if shrinks else side for side in image.size)
    if image.width * image.height > pixels.LARGE:
        image = Image.fromarray(framed(image, Frame(width, height, 0, 0, width, height)))
    elif shrinks:
        image = rgb(image).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    else:
        image = rgb(image)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return Packed("jpg", buffer.getvalue(), *image.size)


class _Fetchers:
    """Threads that fetch and check pictures ahead of the one that writes."""

    def __init__(self, folder: str, options: Options) -> None:
        self.folder, self.options = folder, options
        self._pool = ThreadPoolExecutor(options.workers, thread_name_prefix="fetch")

    def close(self) -> None:
        """Drops what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def results(self, entries: Sequence[Entry]) -> Iterator[Packed | str]:
        """For each entry in order its picture, or the reason why there is none."""
        waiting: deque[Future[Packed | str]] = deque()
        for entry in entries:
            waiting.append(self._pool.submit(self._one, entry))
            if len(waiting) >= AHEAD * self.options.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _one(self, entry: Entry) -> Packed | str:
        if entry.problem:
            return entry.problem
        if not entry.image:
            return "no picture named"
        if not entry.captions and entry.label is None:
            return "no caption"
        try:
            timeout_s, retries = self.options.timeout_s, self.options.retries
            encoded = fetch(entry.image, self.folder, timeout_s=timeout_s, retries=retries)
            return pack_picture(encoded, self.options.image_size)
        except FetchError as error:
            return str(error)
        except Unusable as error:
            return error.kind


def _measure(table: Pictures) -> tuple[int, int, str]:
    """Rows of the table, the lines they take, and a hash of what they say."""
    digest, rows, lines = hashlib.blake2b(digest_size=16), 0, 0
    for image, captions, problem, taken, label in table.entries():
        own = [*([problem] if problem else []), *([] if label is None else [label])]
        digest.update(json.dumps([image, captions, *own]).encode())
        rows += 1
        lines += taken
    return rows, lines, digest.hexdigest()


def _claim(out: str, made_of: Json) -> Folder:
    """The folder, marked as this build's. Raises InputError if it holds anything else."""
    if not is_local(out):
        raise InputError("--out", out, "a folder of this machine", "build here, then copy the shards")
    folder = Folder(out)
    path = Path(folder.path)
    try:
        if path.exists() and not path.is_dir():
            raise InputError("--out", out, "a folder; this is a file", "give another folder")
        marker = folder.read_json(MARKER)
        marker = marker if marker is None or isinstance(marker, dict) else {}
        if marker is None and path.exists() and any(path.iterdir()):
            raise InputError("--out", out, "a new or empty folder, or one of an earlier data build of the same table",
                             "give another folder")  # fmt: skip
        if marker is not None and marker != made_of:
            changed = ", ".join(name for name in made_of if marker.get(name) != made_of[name])
            raise InputError("--out", f"{out}, built with another {changed}", "the same table and options, to continue",
                             "give another folder, or remove this one")  # fmt: skip
        folder.write_json(MARKER, made_of)
    except OSError as error:
        raise InputError("--out", out, f"a folder that can be written ({error})", "give another folder") from None
    return folder


def _stats_name(shard: int) -> str:
    return f"{shard:05d}_stats.json"


def _stats(folder: Folder, shard: int, rows: int) -> PackedRecord | None:
    """What was written of a packed shard of so many rows; None where nothing was, or something else stands there."""
    found = records.take(folder, _stats_name(shard), PackedRecord)
    if found and (found.rows, found.samples + len(found.failed)) != (rows, rows):
        log.warning("%s in %s is of another shard: packed again", _stats_name(shard), folder.address)
        return None
    return found


def _finished(folder: Folder, shard: int, rows: int, retry_failed: bool) -> PackedRecord | None:
    """The statistics of a shard that need not be packed again."""
    stats = _stats(folder, shard, rows)
    if stats is None or not folder.exists(f"{shard:05d}.tar"):
        return None
    return None if retry_failed and stats.failed else stats


def _pack(
    folder: Folder, shard: int, first: int, entries: Sequence[Entry], fetchers: _Fetchers
) -> Iterator[Packed | None]:
    """Writes a shard and its statistics, each whole or not at all; yields each picture, or None for a failed row."""
    from webdataset import TarWriter  # seconds, as it imports torch: not for --help

    target = Path(folder.path) / f"{shard:05d}.tar"
    scratch = target.with_suffix(".tar.tmp")
    failed = []
    # Time and owner stay empty, so that equal rows give equal bytes.
    with scratch.open("wb") as file, TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
        for row, (entry, result) in enumerate(zip(entries, fetchers.results(entries), strict=True), first):
            if isinstance(result, str):
                failed.append(FailureRecord(row=row, image=entry.image, reason=result))
                yield None
                continue
            tar.write(_sample(f"{row:09d}", entry, result))
            yield result
    scratch.replace(target)
    size, samples = target.stat().st_size, len(entries) - len(failed)
    stats = PackedRecord(shard=shard, rows=len(entries), samples=samples, bytes=size, failed=failed)
    records.write(folder, _stats_name(shard), stats)


def _sample(key: str, entry: Entry, packed: Packed) -> dict[str, str | bytes]:
    """A sample as webdataset writes it: the picture, img2dataset's JSON, and the first caption or the class."""
    told: Json = {"label": entry.label}
    if entry.label is None:
        told = {"caption": entry.captions[0], "captions": entry.captions}
    size = {"width": packed.width, "height": packed.height}
    about = {"key": key, "image": without_secrets(entry.image), **told, **size, "status": "success"}
    last = {"cls": str(entry.label)} if entry.label is not None else {"txt": entry.captions[0]}
    return {
        "__key__": key,
        packed.extension: packed.content,
        "json": json.dumps(about, ensure_ascii=False).encode("utf-8", "replace"),
        **{name: text.encode("utf-8", "replace") for name, text in last.items()},
    }
