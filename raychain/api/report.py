"""`raychain.report`: the page that shows a run or a search."""

from __future__ import annotations

from pathlib import Path

from raychain.errors import InputError


def report(run_dir: str | Path) -> str:
    """Writes `report.html` into the folder of a run or a search, at any time, and returns its address.

    Raises InputError for a folder that holds neither, or that cannot be written.
    """
    from raychain.core.storage import Folder, below
    from raychain.pages.writing import REPORT, write_report

    folder = Folder(str(run_dir))
    try:
        write_report(folder)
    except OSError as error:
        raise InputError("RUN_DIR", run_dir, "a folder that can be written", str(error)) from None
    return below(str(run_dir), REPORT)
