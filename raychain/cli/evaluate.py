"""`raychain evaluate`: measures one checkpoint by any number of evaluators, with clip_benchmark's numbers."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, Literal

import typer

from raychain.api.evaluate import (
    CACHE,
    CAPTIONS,
    evaluate,
)
from raychain.terminal import delivered, say


def evaluate_command(
    checkpoint: Annotated[str, typer.Argument(help="open_clip, timm or stage folder, or weights file; s3:// too.")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="clip_benchmark folder, folder of shards, or pattern; may be repeated."),
    ] = None,
    evaluators: Annotated[
        str | None, typer.Option(help="File of evaluators as under `evaluate:`, or a shipped one's name: vtab-plus.")
    ] = None,
    root: Annotated[str | None, typer.Option(help="Address for {root} in the file of --evaluators.")] = None,
    model: Annotated[str | None, typer.Option(help="Architecture of a weights file that does not say it.")] = None,
    captions: Annotated[
        list[str] | None,
        typer.Option("--captions", help="As data.captions.keys, for retrieval; may be repeated. Default txt|lines."),
    ] = None,
    key_split: Annotated[Literal["first", "last"], typer.Option(help="As data.key_split.")] = "first",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default cuda where there is one.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures or texts encoded at a time.")] = 256,
    cache: Annotated[str, typer.Option(help="Folder for decoded pictures, as preload.cache.")] = CACHE,
    models: Annotated[str | None, typer.Option(help="Folder of open_clip model configs: NAME.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Measure CHECKPOINT in fp32: zero-shot classification and retrieval as clip_benchmark does, or any evaluators."""
    chosen = tuple(captions or CAPTIONS)
    options: dict[str, Any] = {"device": device, "batch_size": batch_size, "cache": cache, "models": models}
    options |= {"evaluators": evaluators, "root": root}
    result = evaluate(checkpoint, data or (), model=model, captions=chosen, key_split=key_split, **options)
    if as_json:
        say(json.dumps(result, indent=2), sys.stdout)
    else:
        from raychain.reporting.measured import measured_table

        measured_table(result)
    delivered()
