"""`raychain doctor`: what a run needs and whether it is there, a line each."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from raychain.errors import one_line
from raychain.terminal import delivered, say

SIGNS = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}


def doctor_command(
    storage: Annotated[str | None, typer.Option(help="Folder or address of runs: written to, read, cleared.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to ask; default RAY_ADDRESS, else none.")] = None,
    cache: Annotated[str | None, typer.Option(help="Folder for decoded shards, as preload.cache.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Look at Ray, torch, GPUs, memory, disks, ports, a storage and a cluster; exit status 1 for problems."""
    from raychain.doctor.examining import examine

    found = []
    for finding in examine(storage, address, cache):
        found.append(finding)
        if not as_json:
            fix = f" ({finding.fix})" if finding.fix else ""
            say(one_line(f"{SIGNS[finding.state]:8}{finding.name:10} {finding.said}{fix}"), sys.stdout)
    problems = sum(finding.state == "problem" for finding in found)
    if as_json:
        say(json.dumps({"ok": not problems, "found": [finding._asdict() for finding in found]}, indent=2), sys.stdout)
    delivered()
    if problems:
        raise typer.Exit(1)
