"""`raychain search`: finds a better chain by measurement, training each stage that trials share once."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from raychain.api.search import search
from raychain.cli.completing import experiments
from raychain.terminal import say


def search_command(
    experiment: Annotated[
        str, typer.Argument(help="YAML file, or the name of a shipped experiment.", autocompletion=experiments)
    ],
    trials: Annotated[int | None, typer.Option(help="Chains to try; default search.trials of the file.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value; may be repeated.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the search; default STORAGE/NAME-search.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default RAY_ADDRESS, else this machine.")] = None,
    models: Annotated[str | None, typer.Option(help="Folder of open_clip model configs: NAME.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print search.json to stdout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's own messages.")] = False,
) -> None:
    """Find a better chain by measurement; the same command again continues."""
    options: dict[str, Any] = {"out": out, "address": address, "verbose": verbose, "models": models}
    with redirect_stdout(sys.stderr):  # as `raychain run` does
        result = search(experiment, trials=trials, overrides=tuple(overrides or ()), **options).record
    if as_json:
        say(json.dumps(result, indent=2), sys.stdout)
    else:
        from raychain.reporting.search_table import search_table

        search_table(result)
