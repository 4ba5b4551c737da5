"""The run over time: bars of trace.json in a row a category, when training stood still, world size, and the rate."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from raychain.events import CATEGORIES
from raychain.pages.loading import Run, mapping, number
from raychain.pages.markup import Markup, drawing, join, label, tag, text_width
from raychain.pages.plot import Frame, colour, fitted, path, shortened
from raychain.pages.scales import Scale, moment, short, span, ticks, time_ticks

ROWS = {"stage": "training", "build": "build", "preload": "preload", "evaluation": "evaluate",
        "checkpoint": "checkpoint", "export": "export", "restart": "restart"}  # fmt: skip
LEAST_GAP_S = 0.05
AWAY_S, AWAY_SHARE = 120.0, 0.15
"""Where nothing happens for longer than both, the run was not at work: the axis is cut."""
CUT = 26.0
"""Pixels of a cut."""
LANES = 4
BARS = 3000
"""Bars of a category that are drawn; more are merged first."""


class Bar(NamedTuple):
    """A span in seconds."""

    start: float
    end: float
    category: str
    name: str
    stage: int | None
    lost: bool = False
    """Training that was cut off: known from metrics.jsonl alone."""


class Gap(NamedTuple):
    """Training stood still: from, to, and why."""

    start: float
    end: float
    why: str
    away: bool

    @property
    def length(self) -> float:
        """Seconds."""
        return self.end - self.start


class Story(NamedTuple):
    """What is known of the run over time."""

    bars: list[Bar]
    gaps: list[Gap]
    away: list[tuple[float, float]]
    start: float
    end: float

    @property
    def trained(self) -> float:
        """Seconds in which training ran."""
        return sum(end - start for start, end in _merged(_training(self.bars)))

    @property
    def at_work(self) -> float:
        """Seconds without those when the run was not at work."""
        return self.end - self.start - sum(end - start for start, end in self.away)


def story(run: Run) -> Story | None:
    """Bars, gaps and pauses; None where there are neither a trace nor times in metrics.jsonl."""
    bars = [_bar(raw) for raw in run.bars]
    bars += _cut_off(run, bars)
    if not bars:
        return None
    start, end = min(bar.start for bar in bars), max(bar.end for bar in bars)
    if end - start <= 0:
        return None
    busy = _merged((bar.start, bar.end) for bar in bars)
    idle = [(a[1], b[0]) for a, b in itertools.pairwise(busy)]
    at_work = sum(b - a for a, b in busy)
    away = [(a, b) for a, b in idle if b - a > max(AWAY_S, AWAY_SHARE * at_work)]
    return Story(bars, _gaps(bars, away), away, start, end)


def _bar(raw: dict[str, object]) -> Bar:
    start, stage = (number(raw["ts"]) or 0.0) / 1e6, number(mapping(raw.get("args")).get("stage"))
    end = start + (number(raw["dur"]) or 0.0) / 1e6
    return Bar(start, end, str(raw["cat"]), str(raw["name"]), None if stage is None else int(stage))


def _training(bars: Iterable[Bar]) -> list[tuple[float, float]]:
    return [(bar.start, bar.end) for bar in bars if bar.category == "stage"]


def _merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of the spans."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _cut_off(run: Run, bars: Sequence[Bar]) -> list[Bar]:
    """Training whose bar was never written, because its workers died or are still at it, from the logged steps."""
    covered = _merged(_training(bars))
    restarts = [(bar.start, bar.end) for bar in bars if bar.category == "restart"]
    found: list[Bar] = []
    for stage in run.stages:
        begun: float | None = None
        before: float | None = None
        for line in [*stage.lines, {}]:
            now = number(line.get("time"))
            free = now is not None and not any(a - 1 <= now <= b + 1 for a, b in covered)
            broken = (
                before is not None and now is not None and any(before <= a <= now for a, _ in [*covered, *restarts])
            )
            if begun is not None and before is not None and (not free or broken):
                end = min([a for a, _ in restarts if before <= a <= before + 60], default=before)
                found.append(Bar(begun, end, "stage", stage.model, stage.index, lost=True))
                begun = None
            if free and now is not None:
                if begun is None:  # the step logged first took as long as its samples needed
                    rate = number(line.get("samples_per_s"))
                    wait = min((number(line["samples"]) or 0.0) / rate, 5.0) if rate else 0.0
                    floor = max([b for _, b in [*covered, *restarts] if b <= now], default=now - wait)
                    begun = max(now - wait, floor)
                before = now
    return found


def _gaps(bars: Sequence[Bar], away: Sequence[tuple[float, float]]) -> list[Gap]:
    trained = _merged(_training(bars))
    found = []
    for (_, start), (end, _) in itertools.pairwise(trained):
        if end - start < LEAST_GAP_S:
            continue
        pauses = [b - a for a, b in away if a < end and b > start]
        found.append(Gap(start, end, "the run was not at work" if pauses else _why(start, end, bars), bool(pauses)))
    return found


def _why(start: float, end: float, bars: Sequence[Bar]) -> str:
    """What lies in a gap: `CoM-micro-S: restart after failure 21 s`, `CoM-micro-S → CoM-micro-M: evaluate 1.1 s`."""
    inside: dict[str, float] = {}
    for bar in bars:
        shared = min(bar.end, end) - max(bar.start, start)
        if bar.category != "stage" and shared > LEAST_GAP_S:
            kind = f"restart after {bar.name}" if bar.category == "restart" else ROWS.get(bar.category, bar.category)
            inside[kind] = inside.get(kind, 0.0) + shared
    before = max((bar for bar in bars if bar.category == "stage" and bar.end <= start + 1e-6), key=lambda bar: bar.end)
    after = min((bar for bar in bars if bar.category == "stage" and bar.start >= end - 1e-6), key=lambda bar: bar.start)
    handover = f"{before.name} → {after.name}" if before.stage != after.stage else after.name
    told = ", ".join(f"{kind} {span(seconds)}" for kind, seconds in inside.items())
    return f"{handover}: {told}" if told else handover


class Clock:
    """Times onto pixels, with what the run was not at work cut out."""

    def __init__(self, tale: Story, left: float, right: float) -> None:
        self._cuts, self._start, self._left = tale.away, tale.start, left
        self._scale = max(right - left - CUT * len(tale.away), 40.0) / max(tale.at_work, 1e-9)

    def __call__(self, time: float) -> float:
        x = self._left + (time - self._start) * self._scale
        for start, end in self._cuts:
            if time > start:
                gone = min(time, end) - start
                x += CUT * gone / (end - start) - gone * self._scale
        return x


def timeline(run: Run, tale: Story) -> Markup:
    """Rows of bars, world size and images/s over one time axis."""
    rows: list[str] = [c for c in CATEGORIES if any(bar.category == c for bar in tale.bars)]
    rows += sorted({bar.category for bar in tale.bars} - set(rows))[:8]

    def draw(width: float, narrow: bool) -> tuple[float, Markup]:
        left = 78.0 if narrow else 92.0
        clock = Clock(tale, left, width - 8)
        y, parts = 24.0, [_gap_labels(tale, clock, width)]
        for category in rows:
            lanes = _lanes([bar for bar in tale.bars if bar.category == category])
            height = 24.0 if category == "stage" else 15.0
            parts.append(
                label(left - 10, y + height / 2 + 4, fitted(ROWS.get(category, category), left - 6), "tick", "end")
            )
            for lane in lanes:
                parts += [_drawn(bar, many, clock, y, height, run) for bar, many in _joined(lane, clock)]
                y += height + 3
            y += 5
        bottom = y
        in_tokens = any("tokens_per_s" in line for stage in run.stages for line in stage.lines)
        rate = ("tokens/s", "tokens_per_s") if in_tokens else ("images/s", "samples_per_s")
        for title, key in (("workers", "world_size"), rate):
            chart = _over_time(run, tale, clock, key, title, (left, width - 8, y + 26, y + 88))
            if chart is not None:
                parts.append(chart)
                y, bottom = y + 94, y + 88
        parts += [_cut(clock, start, end, 24.0, bottom) for start, end in tale.away]
        parts.append(_axis(tale, clock, bottom + 6, left, width - 8, narrow))
        return bottom + 46, join(parts)

    return drawing("The run over time", draw)


def _lanes(bars: Sequence[Bar]) -> list[list[Bar]]:
    """Bars over as few rows as keep them apart, at most LANES."""
    lanes: list[list[Bar]] = []
    for bar in sorted(bars, key=lambda bar: (bar.start, -bar.end)):
        lane = next((lane for lane in lanes if lane[-1].end <= bar.start), None)
        if lane is not None:
            lane.append(bar)
        elif len(lanes) < LANES:
            lanes.append([bar])
        else:
            lanes[-1].append(bar)
    return lanes


def _joined(bars: Sequence[Bar], clock: Clock) -> list[tuple[Bar, int]]:
    """Bars, and how many each stands for: short ones of the same stage that touch are drawn as one."""
    found: list[tuple[Bar, int]] = []
    apart = 0.6 if len(bars) < BARS else 2.0
    for bar in bars:
        if found:
            last, many = found[-1]
            short_ones = clock(bar.end) - clock(last.end) < 3 or many > 1
            if (
                bar.category != "stage"
                and last.stage == bar.stage
                and short_ones
                and clock(bar.start) - clock(last.end) < apart
            ):
                found[-1] = (last._replace(end=max(bar.end, last.end)), many + 1)
                continue
        found.append((bar, 1))
    return found


def _drawn(bar: Bar, many: int, clock: Clock, y: float, height: float, run: Run) -> Markup:
    x, right = clock(bar.start), clock(bar.end)
    width = max(right - x, 2.0)
    name = f"{many} × {ROWS.get(bar.category, bar.category)}" if many > 1 else bar.name
    told = f"{name}: {span(bar.end - bar.start)}" + (" (cut off)" if bar.lost else "")
    shade = "restart" if bar.category == "restart" else colour(bar.stage or 0) if bar.stage is not None else "plain"
    box = tag("rect", tag("title", told), x=x, y=y, width=width, height=height, rx=min(3.0, width / 2),
              class_=f"fill {shade}{' lost' if bar.lost else ''}")  # fmt: skip
    if bar.category not in ("stage", "restart"):
        return box
    models = shortened([stage.model for stage in run.stages])
    brief = models[bar.stage] if bar.stage is not None and 0 <= bar.stage < len(models) else bar.name
    text = bar.name if text_width(bar.name) <= width - 12 else fitted(brief, width - 8)
    on = "gap" if bar.category == "restart" else "on-fill lost" if bar.lost else "on-fill"
    return tag("g", box, label(x + width / 2, y + height / 2 + 4.2, text, on, "middle"))


def _gap_labels(tale: Story, clock: Clock, width: float) -> Markup:
    """Over the rows, how long training stood still; of labels that would overlap the longer gap's is kept."""
    taken: list[tuple[float, float]] = []
    parts = []
    for gap in sorted((gap for gap in tale.gaps if not gap.away), key=lambda gap: -gap.length):
        left, right = clock(gap.start), clock(gap.end)
        parts.append(tag("path", d=f"M{left:.1f} 22v-5H{max(right, left + 1):.1f}v5", class_="gap-mark"))
        text = span(gap.length)
        half, middle = text_width(text) / 2 + 4, (left + right) / 2
        middle = min(middle, width - half)
        if all(middle + half <= a or middle - half >= b for a, b in taken):
            taken.append((middle - half, middle + half))
            parts.append(label(middle, 12.0, text, "gap", "middle"))
    return join(parts)


def _cut(clock: Clock, start: float, end: float, top: float, bottom: float) -> Markup:
    x, right = clock(start), clock(end)
    title = tag("title", f"not at work for {span(end - start)}")
    middle = (x + right) / 2
    return tag("g", title, tag("rect", x=x + 2, y=top, width=right - x - 4, height=bottom - top, class_="away"),
               label(middle + 4, (top + bottom) / 2, f"not at work, {span(end - start)}", "tick", "middle",
                     transform=f"rotate(-90 {middle + 4:.1f} {(top + bottom) / 2:.1f})"))  # fmt: skip


def _axis(tale: Story, clock: Clock, y: float, left: float, right: float, narrow: bool) -> Markup:
    values = time_ticks(tale.at_work, 5 if narrow else 10)
    step = values[1] if len(values) > 1 else 1.0
    parts, end = [tag("line", x1=left, x2=right, y1=y, y2=y, class_="base")], -1e9
    for value in _spread_over(values, tale):
        x, text = clock(tale.start + value), moment(value, step)
        half = text_width(text) / 2
        if x - half >= end + 8 and x <= right + 1:
            end = x + half
            parts += [tag("line", x1=x, x2=x, y1=y, y2=y + 4, class_="base"), label(x, y + 18, text, "tick", "middle")]
    return join([*parts, label(right, y + 36, "time since the start", "axis", "end")])


def _spread_over(values: Sequence[float], tale: Story) -> list[float]:
    """Ticks in the steps of `values` over the whole run, without those in its pauses."""
    step = values[1] if len(values) > 1 else max(tale.at_work, 1.0)
    parts, found = [tale.start], []
    busy = []
    for start, end in tale.away:
        busy.append((parts[-1], start))
        parts.append(end)
    busy.append((parts[-1], tale.end))
    for start, end in busy:
        first = -(-(start - tale.start) // step) * step
        found += [first + n * step for n in range(int((end - tale.start - first) // step) + 1)][:200]
    return found


def _over_time(
    run: Run, tale: Story, clock: Clock, key: str, title: str, box: tuple[float, float, float, float]
) -> Markup | None:
    """A quantity of metrics.jsonl over time; where training stood still there is none of it. Numbers of workers are
    steps over an area, speeds a line in the stage's colour.
    """
    left, right, top, base = box
    points: dict[int, list[tuple[float, float]]] = {}
    for stage in run.stages:
        for line in stage.lines:
            time, value = number(line.get("time")), number(line.get(key))
            if time is not None and value is not None:
                points.setdefault(stage.index, []).append((time, value))
    if not points:
        return None
    workers = key == "world_size"
    highest = max(value for inside in points.values() for _, value in inside)
    frame = Frame(Scale(0, 1, left, right), Scale(0.0, highest * 1.08 or 1.0, base, top))
    values = [v for v in ticks(0.0, highest, 3) if v == int(v)] if workers else ticks(0.0, highest, 2)
    parts = [frame.grid(values, "", short), label(left - 10, top - 10, title, "axis", "end")]
    for bar in tale.bars:
        inside = [
            (t, v)
            for t, v in points.get(-1 if bar.stage is None else bar.stage, [])
            if bar.start - 1 <= t <= bar.end + 1
        ]
        if bar.category != "stage" or not inside:
            continue
        inside = [(bar.start, inside[0][1]), *_thinned(inside), (bar.end, inside[-1][1])]
        drawn: list[tuple[float, float] | None] = [(clock(time), frame.y(value)) for time, value in sorted(inside)]
        if workers:
            drawn = [(clock(bar.start), base), *drawn, (clock(bar.end), base)]
            parts.append(path(drawn, "area plain", step=True))
        parts.append(path(drawn, "line plain" if workers else f"line {colour(bar.stage or 0)}", step=workers))
    return join(parts)


def _thinned(points: list[tuple[float, float]], most: int = 600) -> list[tuple[float, float]]:
    """Every n-th point, and each change of value beside it."""
    every = -(-len(points) // most)
    if every == 1:
        return points
    kept = {0, len(points) - 1, *range(0, len(points), every)}
    return [points[i] for i in sorted(kept)]
