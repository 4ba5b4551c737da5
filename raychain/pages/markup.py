"""HTML and SVG as text. Every string that is not `Markup` is escaped: what a run folder says cannot become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable

from raychain.errors import without_secrets

# Settings that are written out (`api_key: …`), besides addresses.
_SECRET = re.compile(
    r"(?i)((?:secret|token(?!i)|passw|credential|api_?key|access_?key|signature)\w*[\"']?\s*[=:]\s*)[^&\s,;]+"
)
_UNPRINTABLE = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
"""What no document may hold, and what turns the direction of the text after it."""
_VOID = {"meta", "link", "br", "hr", "img", "input"}


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def plain_text(value: object) -> str:
    """`value` as text without credentials and without characters that no document may hold."""
    return _UNPRINTABLE.sub("�", _SECRET.sub(r"\1…", without_secrets(str(value))))


def escape(value: object) -> Markup:
    """`value` as markup: itself if it is that, else its text, escaped."""
    return value if isinstance(value, Markup) else Markup(html.escape(plain_text(value), quote=True))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. `class_` is `class`, `a_b` is `a-b`; attributes and children that are None are left out."""
    written = [name]
    for key, value in attributes.items():
        if value is not None:
            value = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            written.append(f'{key.rstrip("_").replace("_", "-")}="{escape(value)}"')
    head = " ".join(written)
    if name in _VOID:
        return Markup(f"<{head}/>")
    return Markup(f"<{head}>{join(children)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Markup:
    """The parts as one piece of markup; those that are None are left out."""
    return Markup(escape(between).join(escape(part) for part in parts if part is not None))


def text_width(text: str, size: float = 12) -> float:
    """About how wide `text` is drawn, in pixels."""
    return sum(0.34 if c in "iljtfr.,:;|'· ()" else 0.86 if c in "mwMW%→" else 0.6 for c in text) * size


def label(x: float, y: float, text: object, class_: str = "", anchor: str = "start", **attributes: object) -> Markup:
    """Text in a drawing, at its baseline."""
    return tag("text", text, x=x, y=y, class_=class_ or None, text_anchor=None if anchor == "start" else anchor,
               **attributes)  # fmt: skip


def drawing(title: str, draw: Callable[[float, bool], tuple[float, Markup]]) -> Markup:
    """A chart twice, for wide pages and for phones; the style sheet shows one of them.

    `draw` gets the width and whether it is the narrow one, and returns the height and the content.
    """
    both = []
    for width, narrow in ((WIDE, False), (NARROW, True)):
        height, content = draw(width, narrow)
        both.append(
            tag("svg", tag("title", title), content, viewBox=f"0 0 {width:g} {height:g}", role="img",
                class_="narrow" if narrow else "wide", width=width, height=float(height))
        )  # fmt: skip
    return tag("div", *both, class_="chart")


WIDE, NARROW = 1000.0, 350.0
"""Widths of drawings in pixels."""
