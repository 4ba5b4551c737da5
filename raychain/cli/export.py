"""`raychain export`: a stage as open_clip, timm, transformers or ONNX's runtimes load it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from raychain.terminal import delivered, say

FORMATS = "open_clip, timm (image tower), transformers (CLIPModel), onnx"


def export_command(
    stage: Annotated[str, typer.Argument(help="Stage folder, or another open_clip folder or file; s3:// too.")],
    to: Annotated[str, typer.Option("--to", help=f"{FORMATS}.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must be new or empty.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Write STAGE as another library loads it, load it there, and compare; what is not equal is refused."""
    from raychain.api.export import export

    folder, differences = export(stage, to, out)
    if as_json:
        say(json.dumps({"folder": str(folder), "to": to, "differences": differences}, indent=2), sys.stdout)
    else:
        said = ", ".join(f"{name} within {difference:.0e}" for name, difference in differences.items())
        say(f"{folder}: loaded by {'onnxruntime' if to == 'onnx' else to} and equal: {said}", sys.stdout)
    delivered()
