"""Puts the page into the run folder."""

from __future__ import annotations

from raychain.core.storage import Folder
from raychain.errors import one_line
from raychain.pages.loading import read
from raychain.pages.page import page
from raychain.pages.worth import beside
from raychain.terminal import say

REPORT = "report.html"


def write_report(folder: Folder) -> None:
    """Writes report.html from the folder's records. Raises InputError where it has none, OSError from its storage."""
    run, search = read(folder)
    folder.write(REPORT, page(run, search, beside(folder, run)).encode())


def leave_report(folder: Folder) -> None:
    """Writes the report, at the end of a run or a search: a page is no reason to fail one, and can be made again."""
    try:
        write_report(folder)
    except Exception as error:
        say(one_line(f"raychain: warning: {folder.address}/{REPORT} was not written: {error}"))
