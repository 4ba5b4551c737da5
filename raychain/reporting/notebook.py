"""Progress in a notebook: one output of the cell, which changes in place."""

from __future__ import annotations

import html
import sys
from typing import Any

from raychain.errors import printable

MOST = 200
"""Lines that are kept."""
STYLE = "white-space:pre-wrap;font-family:ui-monospace,monospace;font-size:13px;line-height:1.5"


class NotebookView:
    """Lines that stay, and below them what is going on."""

    def __init__(self, display: Any) -> None:
        """`display` is IPython's module of that name."""
        self._display, self._handle = display, None
        self._lines: list[str] = []
        self._now, self._share = "", 0.0

    def line(self, text: str) -> None:
        """Adds a line that stays."""
        self._lines = [*self._lines, text][-MOST:]
        self._draw()

    def now(self, text: str, share: float) -> None:
        """Shows what is going on, and the share of it that is done; nothing for an empty text."""
        self._now, self._share = text, share
        self._draw()

    def _draw(self) -> None:
        lines = "\n".join(html.escape(printable(line)) for line in self._lines)
        bar = ""
        if self._now:
            bar = (f'<progress value="{self._share:.4f}" max="1" style="width:100%"></progress>'
                   f"<div>{html.escape(printable(self._now))}</div>")  # fmt: skip
        plain = "\n".join([*self._lines, *([self._now] if self._now else [])])
        content = {"text/html": f'<div style="{STYLE}">{lines}{bar}</div>', "text/plain": printable(plain)}
        if self._handle is None:
            self._handle = self._display.display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def notebook_view() -> NotebookView | None:
    """A view where this process is a notebook's kernel; None elsewhere, a terminal with IPython included."""
    shell = sys.modules.get("IPython.core.getipython")
    found = shell.get_ipython() if shell is not None else None
    if found is None or not hasattr(found, "kernel"):
        return None
    from IPython import display

    return NotebookView(display)
