"""The one console that tables and progress are drawn on."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from raychain.errors import printable

NARROWEST = 20


class _Console(Console):
    """Draws text as it is: no markup in it, and escapes in place of what the terminal would obey."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def make_console(*, stderr: bool = False) -> Console:
    """A console on stdout, or stderr, that is styled on a terminal only."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()  # not Rich's guess, which FORCE_COLOR turns over
    console = _Console(stderr=stderr, force_terminal=terminal, markup=False, emoji=False)
    console.width = max(console.width, NARROWEST)  # COLUMNS may say anything
    return console
