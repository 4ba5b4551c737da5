"""`raychain data`: makes demo shards, checks and indexes shards, packs tables of pictures and captions into shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from raychain.core.wording import several
from raychain.errors import InputError, Interrupted, RunFailed
from raychain.terminal import delivered, say

if TYPE_CHECKING:
    from raychain.dataprep.build import Options

data = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Make, check and pack data."
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]


@data.command("demo")
def demo_command(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    names: Annotated[int, typer.Option(help="Emoji names (classes).")] = 240,
    pictures: Annotated[int, typer.Option(help="Training pictures.")] = 16_000,
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0,
    text: Annotated[bool, typer.Option("--text", help="Python's own documentation in tokens instead.")] = False,
) -> None:
    """Render OpenMoji pictures with captions as webdataset shards, or make tokens of Python's documentation."""
    from raychain.demo import DemoError, make_demo

    if text:
        from raychain.demo.text import make_text

        say(_tokenized(make_text(out)), sys.stdout)
        return
    try:
        summary = make_demo(out, names=names, pictures=pictures, seed=seed)
    except DemoError as error:
        raise InputError("raychain data demo", out, "a new folder and drawable numbers", str(error)) from None
    counts = ", ".join(f"{folder} {count:,}" for folder, count in summary.counts.items())
    say(f"{summary.folder}: {counts} pictures of {names} names ({summary.bytes / 2**20:.0f} MiB)", sys.stdout)


@data.command("check")
def check_command(
    shards: Annotated[list[str], typer.Argument(help="Shard addresses: paths, s3://, globs, braces, folders.")],
    captions: Annotated[
        list[str] | None, typer.Option("--captions", help="As data.captions.keys; may be repeated. Default txt.")
    ] = None,
    key_split: Annotated[
        Literal["first", "last"], typer.Option(help="As data.key_split: at which dot extensions begin.")
    ] = "first",
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unusable samples up to which the exit status is 0.")
    ] = 0.01,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default one a core.")] = None,
    as_json: Json = False,
) -> None:
    """Read SHARDS whole, decode every picture, and tell what is wrong; exit status 1 if too much is."""
    from raychain.data.addresses import expand
    from raychain.data.members import Wanted
    from raychain.dataprep.check import check_shards, default_workers, summary
    from raychain.reporting.checked import check_table
    from raychain.terminal.counting import CountingLine

    wanted = Wanted(_caption_keys(captions), key_split=key_split)
    addresses, found = expand(shards, "SHARDS", commands=True), []
    try:
        with CountingLine("shards checked") as line:
            for checked in check_shards(addresses, wanted, workers or default_workers()):
                found.append(checked)
                bad = sum(len(shard.bad) for shard in found)
                line.show(len(found), len(addresses), f"{bad:,} bad samples" if bad else "")
    except BrokenProcessPool:
        raise RunFailed("a checking process was killed, for want of memory perhaps: try fewer --workers") from None
    place = {address: i for i, address in enumerate(addresses)}
    found.sort(key=lambda shard: place[shard.address])
    result = summary(found) | {"max_bad_fraction": max_bad_fraction}
    if as_json:
        say(json.dumps(result, indent=2), sys.stdout)
    else:
        check_table(result)
    delivered()
    if result["bad_fraction"] > max_bad_fraction:
        raise typer.Exit(1)


@data.command("index")
def index_command(
    shards: Annotated[list[str], typer.Argument(help="Shard addresses: paths, s3://, globs, braces, folders.")],
    captions: Annotated[
        list[str] | None, typer.Option("--captions", help="As data.captions.keys; may be repeated. Default txt.")
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Count pictures with a class (cls), which zero-shot sets have.")
    ] = False,
    key_split: Annotated[
        Literal["first", "last"], typer.Option(help="As data.key_split: at which dot extensions begin.")
    ] = "first",
    out: Annotated[
        str | None, typer.Option("--out", help="Folder of the index, such as `storage`; default: beside the shards.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read SHARDS once and write down what runs would have to read them for, and open_clip's sizes.json."""
    from raychain.data.addresses import expand
    from raychain.data.health import kinds
    from raychain.data.index import INDEX, SIZES
    from raychain.data.members import Wanted
    from raychain.dataprep.index import index_shards

    if labels and captions:
        raise InputError("--labels", f"also --captions {captions[0]}", "one of them a call", "call it once for each")
    wanted = Wanted(label=True, key_split=key_split) if labels else Wanted(_caption_keys(captions), key_split=key_split)
    try:
        result = index_shards(expand(shards, "SHARDS"), wanted, out)
    except KeyboardInterrupt:
        raise Interrupted from None
    except OSError as error:
        raise RunFailed(f"the index cannot be written: {error}") from None
    if as_json:
        say(json.dumps(result, indent=2), sys.stdout)
        return
    bad = f", without {kinds(result['bad'])}" if result["bad"] else ""
    pictures = f"{result['samples']:,} samples with {wanted}{bad}"
    read = f"{result['read']:,} of them read" if result["read"] else "none of them read, as the index had them all"
    say(f"{several(result['shards'], 'shard')} ({result['bytes'] / 2**20:,.1f} MiB), {read}: {pictures}", sys.stdout)
    for folder in result["folders"]:
        say(f"{INDEX} and {SIZES} are in {folder}", sys.stdout)


def _caption_keys(given: list[str] | None) -> tuple[str, ...]:
    """The keys of `--captions`. Raises InputError."""
    from raychain.schema.captions import caption_key

    for key in given or ():
        try:
            caption_key(key)
        except ValueError as error:
            raise InputError("--captions", key, str(error), "correct the key") from None
    return tuple(given or ("txt",))


@data.command("build")
def build_command(
    table: Annotated[
        str,
        typer.Argument(
            help="CSV, TSV, parquet or JSONL of picture paths or URLs and captions; or a "
            "folder with a folder of pictures for each class."
        ),
    ],
    out: Annotated[str, typer.Option("--out", help="Folder of the shards; the same command again continues.")],
    image_column: Annotated[str | None, typer.Option(help="Column of paths or URLs; default: recognised.")] = None,
    caption_column: Annotated[
        list[str] | None, typer.Option(help="Column of captions; may be repeated. Default: recognised.")
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Rows of the table a shard.")] = 10_000,
    image_size: Annotated[
        int | None, typer.Option(min=8, help="Shrink the shorter side to this; default: original bytes.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Pictures fetched at once.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")] = 10.0,
    retries: Annotated[int, typer.Option(min=0, help="Tries after a failed download that may be temporary.")] = 3,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Pack shards with failures again.")] = False,
    test: Annotated[
        float | None, typer.Option(min=0.001, max=0.9, help="Share of each class to hold out, of a folder of classes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack a TABLE of pictures and captions, or folders of classes, into shards that `raychain run` reads."""
    from raychain.dataprep.build import FAILED, Options, build
    from raychain.dataprep.table import open_table
    from raychain.terminal.counting import CountingLine

    options = Options(samples_per_shard, image_size, workers, timeout, retries, retry_failed)
    if Path(table).expanduser().is_dir():
        _build_classes(table, out, options, test, [image_column, *(caption_column or ())], as_json)
        return
    if test is not None:
        raise InputError("--test", test, "a folder of classes as TABLE", "split the table yourself")
    opened = open_table(table, image_column, caption_column or ())
    try:
        with CountingLine("rows") as line:
            result = build(opened, out, options, lambda n, of, bad: line.show(n, of, f"{bad:,} failed" if bad else ""))
    except KeyboardInterrupt:  # Typer's own answer would not say that the work is kept
        raise Interrupted from None
    except OSError as error:
        raise RunFailed(f"{out} cannot be written: {error}") from None
    say(json.dumps(result, indent=2) if as_json else _built(result, FAILED), sys.stdout)
    if not result["samples"]:
        raise RunFailed(f"none of the {result['rows']:,} rows gave a picture; --retry-failed tries them again")


def _build_classes(
    folder: str, out: str, options: Options, test: float | None, columns: Sequence[str | None], as_json: bool
) -> None:
    """`raychain data build` of class folders."""
    from raychain.dataprep.build import FAILED
    from raychain.dataprep.folders import CLASSNAMES, build_folders, open_folders
    from raychain.terminal.counting import CountingLine

    if given := [column for column in columns if column]:
        raise InputError("--image-column, --caption-column", given[0], "none for a folder of classes", "leave it out")
    try:
        found = open_folders(folder, test or 0.0)
        with CountingLine("pictures") as line:
            result = build_folders(
                found, out, options, lambda n, of, bad: line.show(n, of, f"{bad:,} failed" if bad else "")
            )
    except KeyboardInterrupt:
        raise Interrupted from None
    except OSError as error:
        raise RunFailed(f"{out} cannot be written: {error}") from None
    said = [_built(part, FAILED).replace(" rows", " files") for part in result["parts"].values()]
    said.append(f"{result['classes']:,} classes, named in {result['folder']}/{CLASSNAMES}: task.classes is that number")
    say(json.dumps(result, indent=2) if as_json else "\n".join(said), sys.stdout)
    if not all(part["samples"] for part in result["parts"].values()):
        raise RunFailed(f"no file in {folder} gave a picture; --retry-failed tries them again")


@data.command("tokenize")
def tokenize_command(
    text: Annotated[list[str], typer.Argument(metavar="TEXT", help="Files: .txt, .jsonl, .parquet, .tar; globs.")],
    out: Annotated[str, typer.Option("--out", help="New folder for train-*.bin, held_out.bin and tokenizer.json.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, or the address of a tokenizer.json or its folder.")] = "bytes",
    vocabulary: Annotated[
        int | None, typer.Option(min=257, max=2**20, help="Train a byte-level BPE of so many tokens instead.")
    ] = None,
    end: Annotated[str, typer.Option(help="Token between documents.")] = "<|endoftext|>",
    key: Annotated[str, typer.Option("--text", help="What text is called in JSON and tables.")] = "text",
    held_out: Annotated[float, typer.Option(min=0, max=0.5, help="Share of documents that is held out.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Turn TEXT into files of token ids, which runs read and count without a tokenizer."""
    from raychain.data.addresses import expand
    from raychain.dataprep.tokenize import Options, tokenize
    from raychain.terminal.counting import CountingLine

    options = Options(tokenizer, vocabulary, end, key, held_out)
    try:
        with CountingLine("documents") as line:
            result = tokenize(expand(text, "TEXT"), out, options, lambda done: line.show(done, done))
    except KeyboardInterrupt:
        raise Interrupted from None
    except OSError as error:
        raise RunFailed(f"text cannot be made into tokens: {error}") from None
    say(json.dumps(result, indent=2) if as_json else _tokenized(result), sys.stdout)


def _tokenized(result: Mapping[str, Any]) -> str:
    parts = []
    for name in ("train", "held_out"):
        if (found := result[name])["files"]:
            each = found["bytes"] / found["tokens"]
            parts.append(
                f"{name} {found['tokens']:,} tokens of {found['documents']:,} documents ({each:.2f} bytes each)"
            )
    bad = f"; not used: {sum(result['bad'].values()):,}" if result["bad"] else ""
    return f"{result['folder']}: {', '.join(parts)}, a vocabulary of {result['vocabulary']:,}{bad}"


def _built(result: Mapping[str, Any], listed: str) -> str:
    failed = sum(result["failed"].values())
    pictures = f"{result['samples']:,} pictures of {result['rows']:,} rows"
    text = f"{result['folder']}: {several(result['shards'], 'shard')}, {pictures} ({result['bytes'] / 2**20:,.1f} MiB)"
    if result["lines"] != result["rows"]:
        text += f"\nthe rows take {result['lines']:,} lines of the table: captions in quotes span several"
    if failed:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in list(result["failed"].items())[:5])
        text += f"\n{failed:,} of {result['rows']:,} rows failed, listed in {listed}: {reasons}"
    return text
