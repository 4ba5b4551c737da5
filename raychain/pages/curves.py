"""Loss and accuracy over the training MACs of the chain, stage after stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from raychain.core.wording import number as digits
from raychain.evaluators.metrics import Definition
from raychain.pages.loading import Run, Stage, mapping, number, numbers
from raychain.pages.markup import Markup, drawing, join, label, tag, text_width
from raychain.pages.plot import Frame, colour, fitted, path, shortened, spread
from raychain.pages.scales import Scale, around, short, ticks

POINTS = 300
"""A line is drawn through at most so many points; more are averaged in groups, and their range is shaded."""
SERIES = 6
"""Metrics of one chart."""


class Point(NamedTuple):
    """A mean, and the range it is of."""

    x: float
    value: float
    low: float
    high: float


def learning(run: Run) -> Markup | None:
    """The loss curves and a chart of the metrics of each unit, one under the other; None where nothing was logged."""
    units = dict.fromkeys(measure.unit for measure in run.measures)
    parts = [chart for chart in (_losses(run), *(_measured_in(run, unit) for unit in units)) if chart is not None]
    return join(parts) if parts else None


def arrows(label: str, between: str = "") -> str:
    """A metric's label with the directions of retrieval in words, or in letters with `between` them."""
    for short_name, words in (("i2t", "image → text"), ("t2i", "text → image")):
        label = label.replace(short_name, f"{short_name[0]}{between}{short_name[2]}" if between else words)
    return label


class Axis:
    """The horizontal axis: training MACs of the chain, or samples seen where a model's MACs are unknown."""

    def __init__(self, run: Run) -> None:
        self.stages = [stage for stage in run.stages if stage.lines or stage.done]
        self._by_macs = all(stage.at(0) is not None for stage in self.stages)
        self._before: dict[int, float] = {}
        self.end = 0.0
        for stage in self.stages:
            self._before[stage.index] = self.end
            self.end = self.at(stage, stage.seen)

    @property
    def title(self) -> str:
        """What it shows."""
        return "training MACs" if self._by_macs else "samples seen"

    def at(self, stage: Stage, samples: float) -> float:
        """Where the stage is once it has seen `samples`."""
        macs = stage.at(samples)
        return macs if self._by_macs and macs is not None else self._before[stage.index] + samples


def _thinned(points: Sequence[tuple[float, float | None]]) -> list[Point | None]:
    """The points in at most POINTS groups; None where a value is missing."""
    size = -(-len(points) // POINTS) if points else 1
    found: list[Point | None] = []
    for start in range(0, len(points), size):
        group = [(x, v) for x, v in points[start : start + size] if v is not None]
        if not group:
            found.append(None)
            continue
        values = [v for _, v in group]
        mean_x, mean = (sum(column) / len(group) for column in zip(*group, strict=True))
        found.append(Point(mean_x, mean, min(values), max(values)))
    return found


def _losses(run: Run) -> Markup | None:
    axis = Axis(run)
    curves: list[tuple[Stage, str, list[Point | None]]] = []
    for stage in axis.stages:
        for key, kind in (("task_loss", "line"), ("distill_loss", "line dashed")):
            points = [(axis.at(stage, number(line["samples"]) or 0.0), _loss(line, key)) for line in stage.lines]
            if any(value is not None for _, value in points) and (
                key == "task_loss" or any(value for _, value in points)
            ):
                curves.append((stage, kind, _thinned(points)))
    values = [v for _, _, points in curves for p in points if p for v in (p.low, p.high)]
    if not values:
        return None
    distilled = any("dashed" in kind for _, kind, _ in curves)

    def draw(width: float, narrow: bool) -> tuple[float, Markup]:
        frame = _frame(width, narrow, axis.end, around(min(values), max(values), zero=distilled), 42)
        parts = [_stage_bands(axis, frame), _grid(frame, "task loss"), _bottom(frame, axis.title)]
        for stage, kind, points in curves:
            band = [p for p in points if p]
            if any(p.high > p.low for p in band):
                edge = [(p.x, p.high) for p in band] + [(p.x, p.low) for p in reversed(band)]
                d = "M" + "L".join(f"{frame.x(x):.1f} {frame.y(v):.1f}" for x, v in edge) + "Z"
                parts.append(tag("path", d=d, class_=f"band {colour(stage.index)}"))
            line = [(frame.x(p.x), frame.y(p.value)) if p else None for p in points]
            parts.append(path(line, f"{kind} {colour(stage.index)}"))
        if not narrow:
            parts.append(_ends(frame, curves))
        return frame.y.start + 38, join(parts)

    return drawing("Loss of every stage over training MACs", draw)


def _ends(frame: Frame, curves: Sequence[tuple[Stage, str, list[Point | None]]]) -> Markup:
    """What the last stage's lines are, and where they end, at the right."""
    last = curves[-1][0].index
    ends = []
    for stage, kind, points in curves:
        final = next((p for p in reversed(points) if p), None)
        if stage.index == last and final:
            ends.append((f"{'distillation' if 'dashed' in kind else 'task'} {digits(final.value)}", final.value))
    heights = spread([frame.y(value) for _, value in ends], 17, frame.y.end, frame.y.start - 2)
    hue = f"note {colour(last)}"
    return join(label(frame.x.end + 12, y + 4, text, hue) for (text, _), y in zip(ends, heights, strict=True))


def _loss(line: dict[str, object], key: str) -> float | None:
    value = number(line.get(key))
    return number(line.get("loss")) if value is None and key == "task_loss" else value


def _measured_in(run: Run, unit: str) -> Markup | None:
    axis = Axis(run)
    series: dict[Definition, list[tuple[float, float, int]]] = {}
    for measure in [measure for measure in run.measures if measure.unit == unit][:SERIES]:
        for stage in axis.stages:
            for samples, metrics in _measured(run, stage):
                if (value := measure.value(metrics)) is not None:
                    series.setdefault(measure, []).append((axis.at(stage, samples), value, stage.index))
    if not series:
        return None
    values = [value for points in series.values() for _, value, _ in points]
    percents = unit == "%" and min(values) >= 0
    ends_of_axis = (0.0, min(100.0, max(values) * 1.1) or 1.0) if percents else around(min(values), max(values))
    what = "accuracy" if percents else next(iter(series)).label

    def draw(width: float, narrow: bool) -> tuple[float, Markup]:
        above = 20 + 16 * len(series) if narrow else 28
        frame = _frame(width, narrow, axis.end, ends_of_axis, above)
        parts = [_stage_bands(axis, frame, names=False), _grid(frame, f"{what}, {unit}" if unit else what)]
        parts.append(_bottom(frame, axis.title))
        ends = [(key, points[-1][1]) for key, points in series.items()]
        heights = spread([frame.y(value) for _, value in ends], 17, frame.y.end, frame.y.start - 4)
        order = sorted(range(len(ends)), key=lambda n: heights[n])
        for n, ((key, value), height) in enumerate(zip(ends, heights, strict=True)):
            parts.append(path([(frame.x(x), frame.y(v)) for x, v, _ in series[key]], f"line m{min(n, 2)}"))
            told = [(x, v, f"{arrows(key.label)}: {key.written(v)}", hue) for x, v, hue in series[key]]
            parts += [_marker(n, frame.x(x), frame.y(v), title, hue) for x, v, title, hue in told]
            text = f"{arrows(key.label)} {key.number(value)}"
            if narrow:  # at the right end is no room: above the curves, in the order of their heights
                row = 13 + 16 * order.index(n)
                parts.append(_marker(n, width - 8, row - 4.0, told[-1][2], series[key][-1][2]))
                parts.append(label(width - 18, row, text, "note", "end"))
            else:
                parts.append(label(frame.x.end + 12, height + 4, text, "note"))
        return frame.y.start + 38, join(parts)

    return drawing(f"{what[0].upper()}{what[1:]} over training MACs", draw)


def _marker(n: int, x: float, y: float, told: str, hue: int) -> Markup:
    """Circle, square and diamond in turn for the series; the colour is the stage's."""
    title, n = tag("title", told), n % 3
    if n == 0:
        return tag("circle", title, cx=x, cy=y, r=5, class_=f"dot {colour(hue)}")
    turn = f"rotate(45 {x:.1f} {y:.1f})" if n == 2 else None
    return tag("rect", title, x=x - 4.2, y=y - 4.2, width=8.4, height=8.4, class_=f"dot {colour(hue)}", transform=turn)


def _measured(run: Run, stage: Stage) -> list[tuple[float, dict[str, float]]]:
    """Evaluations during the stage and at its end, by samples seen."""
    batch = number(mapping(run.config.get("train")).get("global_batch")) or 0.0
    logged = {number(line.get("step")): number(line["samples"]) for line in stage.lines}
    found = {}
    for evaluation in run.record.evaluations or ():
        if evaluation.stage == stage.index:
            found[logged.get(evaluation.step) or evaluation.step * batch] = numbers(evaluation.metrics)
    if stage.metrics:
        found[stage.seen] = stage.metrics
    return sorted(found.items())


def _frame(width: float, narrow: bool, end: float, values: tuple[float, float], above: float) -> Frame:
    """Both charts' frame, so that their axes are in line; wide ones have room for labels at the right."""
    height = 190.0 if narrow else 216.0
    return Frame(Scale(0.0, end or 1.0, 44, width - (8 if narrow else 186)), Scale(*values, above + height, above))


def _grid(frame: Frame, title: str) -> Markup:
    return frame.grid(ticks(frame.y.low, frame.y.high, 5), title)


def _bottom(frame: Frame, title: str) -> Markup:
    about = 4 if frame.x.end < 500 else 8
    return frame.bottom(ticks(0.0, frame.x.high, about), title, lambda value: short(value, si=True))


def _stage_bands(axis: Axis, frame: Frame, *, names: bool = True) -> Markup:
    """A light band for every other stage, with the model's name in it."""
    parts = []
    for short_name, stage in zip(shortened([stage.model for stage in axis.stages]), axis.stages, strict=True):
        left, right = frame.x(axis.at(stage, 0.0)), frame.x(axis.at(stage, stage.seen))
        if stage.index % 2:
            parts.append(tag("rect", x=left, y=frame.y.end, width=max(right - left, 0.0),
                             height=frame.y.start - frame.y.end, class_="shade"))  # fmt: skip
        if stage.index:
            parts.append(tag("line", x1=left, x2=left, y1=frame.y.end, y2=frame.y.start, class_="divide"))
        if names:
            room = right - left - 8
            text = stage.model if text_width(stage.model, 13) <= room else fitted(short_name, room, 13)
            parts.append(
                label(left + (3 if stage.index else 0), frame.y.end - 8, text, f"stage-name {colour(stage.index)}")
            )
    return join(parts)
