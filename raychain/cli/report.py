"""`raychain report`: the page that shows a run or a search, as a file or live."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

import typer

from raychain.api.report import report
from raychain.cli.completing import runs
from raychain.errors import InputError
from raychain.terminal import say


def report_command(
    run_dir: Annotated[
        str,
        typer.Argument(metavar="RUN_DIR", help="Folder of a run or a search; a path or s3://…", autocompletion=runs),
    ],
    follow: Annotated[
        bool, typer.Option("--follow", help="Serve the page on 127.0.0.1, live, until the run ends.")
    ] = False,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Of --follow; default: any that is free.")] = None,
) -> None:
    """Write RUN_DIR/report.html: one file that shows a run or a search and loads nothing."""
    if port is not None and not follow:
        raise InputError("--port", port, "a port for --follow", "add --follow, or leave --port out")
    if follow:
        from raychain.pages.following import follow as serve

        with suppress(KeyboardInterrupt):  # looking ends, and the run does not
            serve(run_dir, port or 0, lambda text: say(text, sys.stdout))
    say(report(run_dir), sys.stdout)
