"""`raychain grow`: grows one checkpoint into a larger model and says how far its function moved."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from raychain.api.grow import (
    Grown,
    grow_checkpoint,
)
from raychain.cli.completing import models
from raychain.growth import DEPTH_OPERATORS, WIDTH_OPERATORS
from raychain.growth.operators import DEFAULT_DEPTH, DEFAULT_WIDTH
from raychain.terminal import say


def grow_command(
    small: Annotated[str, typer.Argument(help="open_clip or timm folder, .safetensors or .pt file; s3:// too.")],
    to: Annotated[str, typer.Option("--to", help="Model to grow into.", autocompletion=models)],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must be new or empty.")],
    width: Annotated[str, typer.Option(help=f"Width operator: {', '.join(WIDTH_OPERATORS)}.")] = DEFAULT_WIDTH,
    depth: Annotated[str, typer.Option(help=f"Depth operator: {', '.join(DEPTH_OPERATORS)}.")] = DEFAULT_DEPTH,
    source: Annotated[str | None, typer.Option("--from", help="SMALL's model, where a file does not say.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new random parameters.")] = 0,
    data: Annotated[str | None, typer.Option(help="Shards to measure the drift on; default random input.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Inputs to measure the drift on.")] = 4,
    models: Annotated[str | None, typer.Option(help="Folder of open_clip model configs: NAME.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Grow the checkpoint SMALL into a larger model, and report how far its function moved."""
    options: dict[str, Any] = {"width": width, "depth": depth, "source": source, "seed": seed, "models": models}
    grown = grow_checkpoint(small, to, out, **options, data=data, samples=samples)
    if as_json:
        drift = {tower: dataclasses.asdict(measured) for tower, measured in grown.drift.items()}
        inputs = data or "random"
        result = {"folder": str(grown.folder), **grown.report.as_dict(), "drift": drift, "inputs": inputs}
        say(json.dumps(result), sys.stdout)
    else:
        _print(grown, data)


def _print(grown: Grown, data: str | None) -> None:
    report = grown.report
    say(
        f"{grown.folder}: {report.inherited} of {report.total} tensors inherited ({report.width}, {report.depth})",
        sys.stdout,
    )
    for name, tower in report.towers.items():
        if not tower.grown:
            say(f"  {name}: left at its random start, {tower.small} does not grow into {tower.large}", sys.stdout)
            continue
        widths = ", ".join(f"{s.partition('.')[2]} {a} → {b}" for s, (a, b) in tower.widths.items() if a != b)
        for stack, layers in tower.layers.items():
            kept = len({source.layer for source in layers})
            widths += f"{', ' if widths else ''}{stack.partition('.')[2]} {kept} → {len(layers)}"
        say(f"  {name}: {widths}", sys.stdout)
    say(f"drift on {data or 'random input'}:", sys.stdout)
    for name, drift in grown.drift.items():
        say(
            f"  {name}: cosine {drift.cosine:.6f} (worst {drift.worst_cosine:.6f}), "
            f"relative error {drift.relative_error:.1e}",
            sys.stdout,
        )
