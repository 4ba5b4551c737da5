"""`raychain report`: the page that shows a run or a search."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from raychain.api.report import report
from raychain.terminal import say


def report_command(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="Folder of a run or a search; a path or s3://…")],
) -> None:
    """Write RUN_DIR/report.html: one file that shows a run or a search and loads nothing."""
    say(report(run_dir), sys.stdout)
