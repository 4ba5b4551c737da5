"""Draws the README's picture from fresh.json: score on the test split over training MACs, chains and models alone.

python experiments/evidence/picture.py experiments/evidence/fresh.json experiments/screenshots/evidence.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from study import score

LINES = {
    "M alone": ["M 16", "M 32", "M 64"],
    "L alone": ["L 17, warm-up 120", "L 25, warm-up 120", "L 64, warm-up 120"],
    "chain M → L": ["M 32 → L 10", "M 32 → L 12", "M 64 → L 16"],
}
COLOURS = {"M alone": "#8a8f98", "L alone": "#3b6fb6", "chain M → L": "#c2410c"}
BASELINE = "L 64, warm-up 120"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 380, 64, 120, 44, 56
HIGHEST, LOWEST, WIDEST = 30.0, 8.0, 105.0


def main() -> None:
    """Reads the results and writes the picture, both named on the command line."""
    source, target = map(Path, sys.argv[1:])
    runs: list[dict[str, Any]] = json.loads(source.read_text())["runs"]
    target.write_text(picture(runs))


def picture(runs: list[dict[str, Any]]) -> str:
    """The SVG: for each row the mean of its seeds' test scores, and a bar from the lowest to the highest seed."""
    base = sum(r["macs"] for r in runs if r["name"] == BASELINE) / sum(r["name"] == BASELINE for r in runs)
    parts = [_frame()]
    for label, names in LINES.items():
        points = []
        for name in names:
            found = [r for r in runs if r["name"] == name]
            scores = [score(r["metrics"]["test"]) for r in found]
            x, y = _x(100 * found[0]["macs"] / base), _y(sum(scores) / len(scores))
            points.append((x, y))
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_y(min(scores)):.1f}" y2="{_y(max(scores)):.1f}" '
                         f'stroke="{COLOURS[label]}" stroke-width="2" opacity="0.5"/>')  # fmt: skip
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{COLOURS[label]}"/>')
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[label]}" stroke-width="2.5"/>')
        x, y = points[-1]
        parts.append(_text(x + 12, y + 5, label, "start", COLOURS[label], "600 15px"))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Score over training cost: the chain of two models against each model alone">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _x(percent: float) -> float:
    return LEFT + percent / WIDEST * (WIDTH - LEFT - RIGHT)


def _y(points: float) -> float:
    return TOP + (HIGHEST - points) / (HIGHEST - LOWEST) * (HEIGHT - TOP - BOTTOM)


def _frame() -> str:
    parts = [_text(LEFT - 40, 24, "score on held-out pictures, points (mean and range of 3 seeds)", "start", "#374151")]
    for value in range(10, int(HIGHEST) + 1, 5):
        y = _y(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        parts.append(_text(LEFT - 10, y + 5, str(value), "end", "#6b7280"))
    for percent in (0, 25, 50, 75, 100):
        parts.append(_text(_x(percent), HEIGHT - BOTTOM + 22, f"{percent} %", "middle", "#6b7280"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 10, "training MACs, of L alone for 64 epochs", "end", "#374151"))
    return "\n".join(parts)


def _text(x: float, y: float, text: str, anchor: str, colour: str, font: str = "14px") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" '
            f'style="font: {font} system-ui, sans-serif">{text}</text>')  # fmt: skip


if __name__ == "__main__":
    main()
