"""`raychain report`: the page that shows a run or a search."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from raychain import command
from raychain.errors import InputError
from raychain.terminal import say

command(__name__)


def report(run_dir: str | Path) -> str:
    """Writes `report.html` into the folder of a run or a search, at any time, and returns its address.

    Raises InputError for a folder that holds neither, or that cannot be written.
    """
    from raychain.reporting.report.writing import REPORT, write_report
    from raychain.storage import Folder, below

    folder = Folder(str(run_dir))
    try:
        write_report(folder)
    except OSError as error:
        raise InputError("RUN_DIR", run_dir, "a folder that can be written", str(error)) from None
    return below(str(run_dir), REPORT)


def report_command(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="Folder of a run or a search; a path or s3://…")],
) -> None:
    """Write RUN_DIR/report.html: one file that shows a run or a search and loads nothing."""
    say(report(run_dir), sys.stdout)


if __name__ == "__main__":
    from raychain.run import main

    main(report_command, Path(sys.argv[0]).stem)
