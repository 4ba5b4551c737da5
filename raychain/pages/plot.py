"""The frame that charts share: axes, grid, titles, and labels that keep apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from raychain.pages.markup import Markup, join, label, tag, text_width
from raychain.pages.scales import Scale, short

COLOURS = 6
"""Colours of stages in the style sheet; further stages start again."""


def colour(index: int) -> str:
    """The style class that colours stage `index`."""
    return f"c{index % COLOURS}"


@dataclass(frozen=True)
class Frame:
    """The area of a chart inside its axes."""

    x: Scale
    y: Scale

    def grid(self, values: Sequence[float], title: str, write: Callable[[float], str] = short) -> Markup:
        """Horizontal lines with their values at the left, and what they are above."""
        lines = [
            tag("g", tag("line", x1=self.x.start, x2=self.x.end, y1=self.y(v), y2=self.y(v), class_="grid"),
                label(self.x.start - 8, self.y(v) + 4, write(v), "tick", "end"))
            for v in values
        ]  # fmt: skip
        return join([*lines, label(0.0, 13.0, title, "axis") if title else None])

    def bottom(self, values: Sequence[float], title: str, write: Callable[[float], str] = short) -> Markup:
        """The horizontal axis: its line, values, and what they are. Values that would touch are left out."""
        base, end = self.y.start, -1e9
        parts = [tag("line", x1=self.x.start, x2=self.x.end, y1=base, y2=base, class_="base")]
        for value in values:
            x, text = self.x(value), write(value)
            half = text_width(text, 12) / 2
            if x - half < end + 8:
                continue
            end = x + half
            parts.append(tag("line", x1=x, x2=x, y1=base, y2=base + 4, class_="base"))
            parts.append(label(x, base + 18, text, "tick", "middle"))
        return join([*parts, label(self.x.end, base + 36, title, "axis", "end")])


def path(points: Iterable[tuple[float, float] | None], class_: str, *, step: bool = False) -> Markup:
    """A line through the points; it is broken at None. With `step` it keeps each height up to the next point."""
    written, pen, last = [], False, 0.0
    for point in points:
        if point is None:
            pen = False
            continue
        x, y = point
        if pen and step:
            written.append(f"L{x:.1f} {last:.1f}")
        written.append(f"{'L' if pen else 'M'}{x:.1f} {y:.1f}")
        pen, last = True, y
    return tag("path", d=" ".join(written), class_=class_) if written else Markup("")


def spread(wanted: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `distance` apart and from `low` to `high` where they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        placed[i] = floor = max(wanted[i], floor)
        floor += distance
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - distance
    return placed


def shortened(names: Sequence[str]) -> list[str]:
    """The names without what they all begin with, up to a `-`: `S`, `M`, `L` for a family's models."""
    if len(set(names)) < 2:
        return list(names)
    shared = 0
    for i, characters in enumerate(zip(*names, strict=False)):
        if len(set(characters)) > 1:
            break
        shared = i + 1 if characters[0] == "-" else shared
    return [name[shared:] or name for name in names]


def fitted(text: str, width: float, size: float = 12) -> str:
    """The text, cut to a width in pixels; nothing where not even a few letters fit."""
    if text_width(text, size) <= width:
        return text
    while len(text) > 2 and text_width(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…" if len(text) > 2 else ""
