"""Puts the page into the run folder."""

from __future__ import annotations

from raychain.reporting.report.loading import read
from raychain.reporting.report.page import page
from raychain.storage import Folder

REPORT = "report.html"


def write_report(folder: Folder) -> None:
    """Writes report.html from the folder's records. Raises InputError where it has none, OSError from its storage."""
    folder.write(REPORT, page(*read(folder)).encode())
