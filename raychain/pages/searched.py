"""A search: the Pareto front of its trials, the tree of stages that trials shared, and the trials."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from raychain.core.wording import MISSING, macs
from raychain.evaluators.metrics import Definition
from raychain.pages.loading import amount
from raychain.pages.markup import Markup, drawing, join, label, tag, text_width
from raychain.pages.plot import Frame, colour, fitted, path, shortened
from raychain.pages.scales import Scale, around, log_ticks, short, ticks
from raychain.pages.search_json import Search, Step, Trial
from raychain.pages.tables import table

DRAWN = 60
"""Trials of the stage tree."""
COLUMNS = 4
"""Metrics of the table of trials."""


def named(search: Search, trial: Trial) -> str:
    """`S 8 → M 3 → L 1`."""
    short_of = _short_names(search)
    return " → ".join(f"{short_of[step.model]} {step.length.partition(' ')[0]}".strip() for step in trial.chain)


def _short_names(search: Search) -> dict[str, str]:
    longest_first = sorted(search.trials, key=lambda trial: -len(trial.chain))  # so that models come in their order
    names = list(dict.fromkeys(step.model for trial in longest_first for step in trial.chain))
    return dict(zip(names, shortened(names), strict=True))


def pareto(search: Search) -> Markup | None:
    """Accuracy over training MACs, the front as a line; None without a measured trial."""
    values = {t.number: value for t in search.trials if t.macs and (value := search.value(t)) is not None}
    shown = [t for t in search.trials if t.number in values]
    if not shown:
        return None
    alone, metric = amount(search.baseline.macs), search.metric
    title = metric.label
    costs = [t.macs or 1.0 for t in shown] + ([alone] if alone else [])
    low, high = min(costs), max(costs)
    log = high / low > 8
    ends = (low * 0.8, high * 1.25) if log else around(low, high)

    def draw(width: float, narrow: bool) -> tuple[float, Markup]:
        frame = Frame(
            Scale(max(ends[0], low * 0.5), ends[1], 44, width - 8, log),
            Scale(*around(min(values.values()), max(values.values())), 330, 40),
        )
        marks = log_ticks(frame.x.low, frame.x.high) if log else ticks(frame.x.low, frame.x.high, 4 if narrow else 8)
        parts = [frame.grid(ticks(frame.y.low, frame.y.high, 5), f"{title}, {metric.unit}" if metric.unit else title),
                 frame.bottom(marks, "training MACs", lambda v: short(v, si=True))]  # fmt: skip
        if alone:
            x = frame.x(alone)
            parts.append(tag("line", x1=x, x2=x, y1=40, y2=330, class_="baseline"))
            name = f"{search.baseline.model or 'the last model'} alone"
            parts.append(label(min(x + 4, width), 33, fitted(name, x - 60), "note muted", "end"))
        taken: list[tuple[float, float, float, float]] = []
        corners = [(frame.x(t.macs or 1), frame.y(values[t.number])) for t in search.front]
        parts.append(path(corners, "line c0", step=True))
        for (x, y), (next_x, next_y) in itertools.pairwise(corners):  # labels keep off the line
            taken += [(x, next_x, y - 2, y + 2), (next_x - 2, next_x + 2, min(y, next_y), max(y, next_y))]
        for trial in shown:
            x, y = frame.x(trial.macs or 1), frame.y(values[trial.number])
            told = f"{named(search, trial)}: {macs(trial.macs)} MACs, {metric.written(values[trial.number])}"
            front, is_best = trial in search.front, trial == search.best
            parts.append(tag("circle", tag("title", told), cx=x, cy=y, r=5.5 if front else 4,
                             class_="dot c0" if front else "dot rest"))  # fmt: skip
            if is_best:
                parts.append(tag("circle", cx=x, cy=y, r=9.5, class_="ring"))
            taken.append((x - 6, x + 6, y - 6, y + 6))
        for trial in sorted(search.front, key=lambda t: t != search.best):
            text = named(search, trial) + (" (best)" if trial == search.best else "")
            x, y = frame.x(trial.macs or 1), frame.y(values[trial.number])
            if placed := _place(text, x, y, width, taken):
                parts.append(label(placed[0], placed[1], text, "note"))
        return 376.0, join(parts)

    return drawing(f"{title} of the trials over training MACs", draw)


def _place(
    text: str, x: float, y: float, width: float, taken: list[tuple[float, float, float, float]]
) -> tuple[float, float] | None:
    """Where a label beside a point touches nothing else."""
    length = text_width(text)
    before, middle = -length - 12, -length / 2
    for dx, dy in (
        (12, 18),
        (12, -10),
        (before, -10),
        (before, 4),
        (before, 18),
        (middle, -16),
        (middle, 26),
        (12, 34),
    ):
        left, base = x + dx, y + dy
        box = (left, left + length, base - 12, base + 3)
        if left < 46 or box[1] > width - 4 or box[2] < 40 or box[3] > 328:
            continue
        if all(box[1] < a or box[0] > b or box[3] < c or box[2] > d for a, b, c, d in taken):
            taken.append(box)
            return left, base
    return None


class _Node(NamedTuple):
    step: Step
    trials: list[Trial]
    children: dict[Step, Any]


def tree(search: Search) -> Markup | None:
    """Chains from left to right; stages that trials have in common, with all before them, are drawn once."""
    shown = [trial for trial in search.trials if trial.chain][:DRAWN]
    if not shown:
        return None
    roots: dict[Step, _Node] = {}
    for trial in shown:
        level = roots
        for step in trial.chain:
            node = level.setdefault(step, _Node(step, [], {}))
            node.trials.append(trial)
            level = node.children
    deepest = max(len(trial.chain) for trial in shown)
    names = _short_names(search)
    models = list(names)
    row_height = 40.0

    def draw(width: float, narrow: bool) -> tuple[float, Markup]:
        column = min((width - (0 if narrow else 90)) / deepest, 260.0)
        edges: list[Markup] = []
        boxes: list[Markup] = []
        rows = [0]

        def place(node: _Node, depth: int) -> float:
            ys = [place(child, depth + 1) for child in node.children.values()]
            ends_here = len(node.trials) > sum(len(child.trials) for child in node.children.values())
            if ends_here or not ys:
                y = 8 + row_height * rows[0] + 15
                rows[0] += 1
            else:
                y = (ys[0] + ys[-1]) / 2
            x, box = depth * column, column - (26 if narrow else 46)
            for child, below in zip(node.children.values(), ys, strict=True):
                thick, middle = min(1.5 + 1.2 * (len(child.trials) - 1), 9.0), x + box + (column - box) / 2
                d = f"M{x + box:.1f} {y:.1f}C{middle:.1f} {y:.1f} {middle:.1f} {below:.1f} {x + column:.1f} {below:.1f}"
                edges.append(tag("path", d=d, class_="branch", stroke_width=thick))
            boxes.append(_box(node, x, y, box, names, models.index(node.step.model), search))
            if ends_here and not narrow and not node.children:
                value = search.value(max(node.trials, key=search.rank))
                if value is not None:
                    boxes.append(label(x + box + 10, y + 4, search.metric.written(value), "note"))
            return y

        for root in roots.values():
            place(root, 0)
        return 12 + row_height * rows[0], join([*edges, *boxes])

    left_out = len([trial for trial in search.trials if trial.chain]) - len(shown)
    more = (
        tag("p", f"The first {DRAWN} trials; {left_out:,} more are in the table.", class_="muted") if left_out else None
    )
    return join([drawing("Stages that trials shared", draw), more])


def _box(node: _Node, x: float, y: float, width: float, names: dict[str, str], hue: int, search: Search) -> Markup:
    step, shared = node.step, len(node.trials)
    best = search.best is not None and search.best in node.trials
    settings = f", {step.rest}" if step.rest else ""
    told = f"{step.model}, {step.length or 'no length'}{settings}: in {shared} trial{'s' if shared > 1 else ''}"
    length = step.length.replace("epochs", "ep").replace("epoch", "ep")
    count = f"×{shared}" if shared > 1 else ""
    room = width - 16 - (text_width(count) + 6 if count else 0)
    text = next(
        (t for t in (f"{step.model} · {length}", f"{names[step.model]} · {length}") if text_width(t) <= room),
        names[step.model],
    )
    return tag("g", tag("title", told),
               tag("rect", x=x + 1, y=y - 15, width=width - 1, height=30, rx=6,
                   class_=f"node {colour(hue)}{' best' if best else ''}"),
               label(x + 9, y + 4.5, fitted(text, room), "node-text"),
               label(x + width - 8, y + 4.5, count, "node-count", "end") if count else None)  # fmt: skip


def trials(search: Search) -> Markup | None:
    """A row a trial, best first."""
    if not search.trials:
        return None
    had = [d for d in search.measures if any(d.value(t.metrics) is not None for t in search.trials)]
    metrics = [search.metric, *(d for d in had if d != search.metric)][:COLUMNS]
    extra = _differing(search.trials)
    order = sorted(search.trials, key=lambda t: (-search.rank(t), t.macs or 0, t.number))
    rows = []
    for trial in order:
        mark = "best" if trial == search.best else "Pareto" if trial in search.front else None
        mark = tag("span", mark, class_="mark") if mark else None
        rows.append((
            join([named(search, trial) or MISSING, mark], " "), f"{trial.number}", macs(trial.macs),
            *(d.number(d.value(trial.metrics)) for d in metrics),
            *(_value(trial.rest.get(k)) for k in extra), trial.status, trial.reason,
        ))  # fmt: skip
    heads = (("chain: model, epochs", False), ("trial", True), ("MACs", True),
             *((f"{d.label} {d.unit}".strip(), True) for d in metrics),
             *((k.replace("_", " "), False) for k in extra), ("status", False), ("reason", False))  # fmt: skip
    return table(heads, rows, "sortable")


def against(search: Search) -> Markup | None:
    """A row for each model alone, at the best chain's MACs and at its best."""
    rows = []
    for compared in search.comparisons:
        equal, most = compared.at_equal_macs, compared.at_most
        both = [(equal, "equal MACs"), (most, "its best")]
        for alone, words in both if equal != most else [(equal, "equal MACs, best")]:
            if alone is not None:
                value = search.metric.number(search.metric.value(alone.content()))
                lead = _lead(search.metric, alone.chain_is_ahead_by)
                rows.append((compared.model, words, f"{alone.epochs:.3g}", macs(amount(alone.macs)), value, lead))
    heads = (("alone", False), ("at", False), ("epochs", True), ("MACs", True),
             (f"{search.metric.label} {search.metric.unit}".strip(), True), ("the best chain is", False))  # fmt: skip
    return table(heads, rows) if rows else None


def _lead(metric: Definition, lead: float) -> str:
    if abs(lead) < metric.tie:
        return "as good"
    unit = "points" if metric.unit == "%" else metric.unit
    return f"{metric.number(abs(lead))} {unit} {'ahead' if lead > 0 else 'behind'}".replace("  ", " ")


def _differing(trials: Sequence[Trial]) -> list[str]:
    """Settings that are not the same in all trials."""
    kinds = (str, int, float)
    keys = dict.fromkeys(k for t in trials for k, v in t.rest.items() if isinstance(v, kinds))
    return [k for k in keys if len({str(t.rest.get(k)) for t in trials}) > 1][:6]


def _value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return MISSING if value is None else str(value)
    return f"{value:.4g}"
