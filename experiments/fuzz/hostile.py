"""Hostile content of each kind, drawn with the generators of the property tests where there are any."""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
import tarfile
from copy import deepcopy
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import test_checkpoint_files
import test_hostile_shards
import test_records
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from test_broken_shards import add
from test_feed import plain

NUMBERS = st.sampled_from(
    [0, 1, -1, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
)
TEXTS = st.text(max_size=12) | st.sampled_from(
    ["", "\0", "\x1b[2J", "\u202e", "\ufeff", "a" * 70_000, "é" * 300, "../../x", "/etc/passwd", "~nobody-here/x",
     "{0..9}", "[a-z]", "%", "{", "'", '"', "\\", "a\nb", "a\tb", ".", "..", "-", "--help",
     "=", "1e999", "null", "0x10", "NaN"]
)  # fmt: skip


@st.composite
def bent(draw: st.DrawFn, good: st.SearchStrategy[bytes], least: int = 0) -> bytes:
    """A content of which a few places were changed, put in, lost, doubled, or all after one."""
    content = bytearray(draw(good))
    for _ in range(draw(st.integers(least, 4))):
        place = draw(st.integers(0, max(0, min(len(content), 600) - 1)) | st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["flip", "number", "cut", "insert", "drop", "double", "zero"])):
            case "flip" if content:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "number":
                form = draw(st.sampled_from(["<H", ">H", "<I", ">I", "<Q", ">Q"]))
                packed = struct.pack(form, draw(NUMBERS) % 2 ** (8 * struct.calcsize(form)))
                content[place : place + len(packed)] = packed
            case "cut":
                del content[place:]
            case "insert":
                content[place:place] = draw(st.binary(min_size=1, max_size=16))
            case "drop":
                del content[place : place + draw(st.integers(1, 64))]
            case "double":
                content[place:place] = content[place : place + draw(st.integers(1, 512))] * draw(
                    st.sampled_from([1, 9])
                )
            case "zero":
                content[place : place + 8] = bytes(8)
    return bytes(content)


def odd(good: Any) -> st.SearchStrategy[bytes]:
    """JSON of which a value or two are of another kind, or that is damaged."""
    once = test_records.odd(json.dumps(good).encode())
    return once | once.map(lambda content: content + b"\n") | bent(once, 1) | once.flatmap(_odd_again)


def _odd_again(content: bytes) -> st.SearchStrategy[bytes]:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return st.just(content)
    return test_records.odd(content)


# Tars

FORMS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000", "AVIF", "DDS", "PCX", "SGI"]
MODES = ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "I;16", "I", "F"]


@st.composite
def picture(draw: st.DrawFn) -> bytes:
    """An encoded picture of any format and mode, mostly damaged; all noise, so that nothing is small by chance."""
    size = draw(st.sampled_from([(9, 7), (64, 48), (1, 1), (3000, 1), (1, 3000), (500, 400)]))
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    mode, form = draw(st.sampled_from(MODES)), draw(st.sampled_from(FORMS))
    image = Image.fromarray(noise)
    image = image.convert(mode) if mode != "I;16" else Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    more = {"progressive": True} if form == "JPEG" and draw(st.booleans()) else {}
    if form in ("GIF", "TIFF", "WEBP", "PNG") and draw(st.booleans()):
        more = {"save_all": True, "append_images": [image] * 3}
    buffer = io.BytesIO()
    try:
        image.save(buffer, form, **more)
    except (OSError, ValueError, KeyError):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
    return draw(bent(st.just(buffer.getvalue())))


ANNOTATION = odd({"key": "0", "captions": ["a word", "two. words"], "caption": "a", "a": {"b": ["c"]}})
CONTENT = {
    "txt": TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=40),
    "json": ANNOTATION,
    "cls": TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.integers().map(lambda n: str(n).encode()),
    **{kind: picture() for kind in ("png", "jpg", "webp", "JPEG")},
}


@st.composite
def tar(draw: st.DrawFn) -> bytes:
    """A tar of samples whose members are hostile, or whose headers are."""
    if draw(st.integers(0, 3)) == 0:
        return draw(bent(test_hostile_shards.mutated()))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=draw(st.sampled_from([0, 1, 2]))) as out:
        for n in range(draw(st.sampled_from([0, 0, 2]))):
            add(out, f"good{n}.png", plain(n)), add(out, f"good{n}.txt", b"a word")
        for _ in range(draw(st.integers(0, 5))):
            name = draw(st.sampled_from(["0", "1", "a/2", "photo.v1", "é"]) | test_hostile_shards.names | TEXTS)
            for extension in draw(st.lists(st.sampled_from([*CONTENT, "png", "txt"]), max_size=4)):
                try:
                    add(out, f"{name}.{extension}", draw(CONTENT[extension]))
                except (ValueError, UnicodeError):  # too long for the format
                    continue
    content = buffer.getvalue()
    return draw(st.sampled_from([content, gzip.compress(content)]) | bent(st.just(content), 1))


# Tables

PLACES = ["0.png", "1.png", "none.png", "sub/0.png", "/dev/zero", "/proc/self/mem", "/proc/kmsg", ".", "~no-such/x",
          "data:,x", "file:///dev/zero", "file://h/x", "http://127.0.0.1:9/x", "http://[::1", "http:///",
          "https://é.example/%zz", "s3:///", "memory://x", "zip://a::b", "simplecache::file:///x", "x" * 5000,
          "\udc80", "0.png\0", " 0.png ", ""]  # fmt: skip
CELLS = st.sampled_from(PLACES) | TEXTS
HEADS = st.sampled_from(["url", "path", "caption", "text", "title", "URL", "captions", "image", "", "x"])
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-32"]


@st.composite
def table(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's name and content."""
    heads = draw(st.sampled_from([["path", "caption"]] * 3) | st.lists(HEADS, max_size=4))
    rows = draw(st.lists(st.lists(CELLS, min_size=1, max_size=4) | st.lists(CELLS, min_size=2, max_size=2), max_size=8))
    rows = [["2.png", f"word {n}"] for n in range(draw(st.sampled_from([0, 1, 3])))] + rows
    kind = draw(st.sampled_from(["csv", "tsv", "jsonl", "parquet", "json", "txt"]))
    if kind == "parquet":
        content = draw(parquet(heads, rows) | bent(parquet(heads, rows)))
    elif kind.startswith("json"):
        records = [dict(zip(heads, row, strict=False)) for row in rows]
        lines = [draw(st.just(json.dumps(r).encode()) | odd(r)) for r in records]
        content = b"\n".join(lines)
    else:
        file = io.StringIO(newline="")
        delimiter = draw(st.sampled_from([",", "\t"])) if kind == "txt" else "," if kind == "csv" else "\t"
        quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
        csv.writer(file, delimiter=delimiter, quoting=quoting).writerows([heads, *rows])
        content = file.getvalue().encode(draw(st.sampled_from(ENCODINGS)), "replace")
        content = draw(st.just(content) | bent(st.just(content)))
    if draw(st.integers(0, 7)) == 0:
        return f"t.{kind}.gz", draw(st.just(gzip.compress(content)) | bent(st.just(gzip.compress(content))))
    return f"t.{kind}", content


@st.composite
def parquet(draw: st.DrawFn, heads: list[str], rows: list[list[str]]) -> bytes:
    """The table as parquet, some of whose columns are of other types."""
    others = [st.lists(test_records.ANYTHING, min_size=1), st.binary(), st.integers(-(2**63), 2**63 - 1), st.floats()]
    columns: dict[str, Any] = {}
    for i, head in enumerate(dict.fromkeys(heads)):
        values: list[Any] = [row[i] if i < len(row) else None for row in rows]
        if draw(st.integers(0, 3)) == 0:
            values = draw(st.lists(draw(st.sampled_from(others)), min_size=len(rows), max_size=len(rows)))
        try:
            columns[head] = pa.array(values)
        except (pa.ArrowException, UnicodeError, OverflowError, TypeError):
            columns[head] = pa.nulls(len(rows))
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression=draw(st.sampled_from(["snappy", "zstd", "none"])))
    return buffer.getvalue()


# Experiments

VALUES = [0, 1, -1, 10**6, 10**30, 1e-30, 1e308, float("inf"), float("nan"), True, None, "", [], {}, "10 %",
          "1e3 steps", "-1 steps", "9e99 epochs", "0 %", "1 minutes", "CoM-micro-L", "RN50", "ViT-B-32", "test_vit",
          "nothing", "s3:///", "gs://", "x.tar", "/dev/null", "/proc", "/dev/zero", "~no-such/x", "{0..3}.tar", "x\0",
          "\x1b[2J", "raw", "wsd", "none", [1, 2], [2, 1], {"a": 1}, "local", "auto", "127.0.0.1:1"]  # fmt: skip


@st.composite
def experiment(draw: st.DrawFn, *trees: dict[str, Any]) -> bytes:
    """One of the experiments in which a few values are others, as YAML that may be damaged."""
    tree: Any = deepcopy(draw(st.sampled_from(trees)))
    if draw(st.integers(0, 5)) == 0:
        tree["search"] = {
            "space": {"models": "CoM-micro-{S,M}", "first": "10 steps", "grown": ["4 steps"]},
            "trials": 2,
        }
    if draw(st.integers(0, 5)) == 0:
        tree["family"], tree["chain"] = (
            draw(st.sampled_from([["CoM-micro-S", "CoM-micro-M"], "CoM-micro-{S,M}", "x"])),
            [],
        )
    for _ in range(draw(st.integers(0, 3))):
        places = [place for place in test_records.paths(tree) if place]
        if not places:
            break
        place = draw(st.sampled_from(places))
        value = deepcopy(draw(st.sampled_from(VALUES) | test_records.ANYTHING))
        tree = test_records.changed(tree, place, value)
    try:
        text = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
    except (yaml.YAMLError, UnicodeError):
        text = json.dumps(tree)
    content = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)):
        return content
    marks = st.sampled_from(
        [b"&a ", b"*a", b"!!python/object:os.system ", b"? ", b"<<: *a\n", b"\t", b"|\n", b">-\n", b"- ", b"{", b"["]
    )
    place = draw(st.integers(0, len(content)))
    return draw(bent(st.just(content[:place] + draw(marks) + content[place:])))


# Checkpoints


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


@st.composite
def weights(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's name and content."""
    tensors = test_checkpoint_files.tensors()
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(tensors)))
        shape = draw(st.sampled_from([(), (0,), (1,), (8, 16), (16, 16)]))
        kind = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]))
        tensors[draw(st.sampled_from([name, f"module.{name}", "x"]))] = torch.ones(shape).to(kind)
        if draw(st.booleans()):
            tensors.pop(name, None)
    if draw(st.booleans()):
        good = save(tensors)
        size = int.from_bytes(good[:8], "little")
        header = draw(bent(st.just(good[:8])) | st.just(good[:8])) + draw(bent(st.just(good[8 : 8 + size])))
        return "open_clip_model.safetensors", header + good[8 + size :]
    buffer = io.BytesIO()
    more = draw(st.sampled_from([{}, {"epoch": 3}, {"epoch": "x", "optimizer": {}}]))
    torch.save({"state_dict": tensors, **more} if more else tensors, buffer)
    return draw(st.sampled_from(["model.pt", "open_clip_pytorch_model.bin"])), draw(bent(st.just(buffer.getvalue())))
