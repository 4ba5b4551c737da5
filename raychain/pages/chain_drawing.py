"""The chain as a drawing: every model a square whose area is its size, with the growth between them; and its cost as a
bar beside that of training the last model alone."""

from __future__ import annotations

import math

from raychain.core.wording import macs
from raychain.core.wording import number as digits
from raychain.pages.loading import Run, Stage, amount, mapping
from raychain.pages.markup import Markup, drawing, join, label, tag, text_width
from raychain.pages.plot import colour, fitted, shortened
from raychain.records import TotalsRecord

MARKS = {"failed": "failed", "unfinished": "unfinished", "not started": "not started"}


def chain(run: Run) -> Markup | None:
    """Squares from left to right, on phones from top to bottom; None without stages."""
    if not run.stages:
        return None
    sizes, facts = [size or 0.0 for size in areas(run.stages)], [_facts(run, stage) for stage in run.stages]

    def draw(width: float, narrow: bool) -> tuple[float, Markup]:
        return (_column if narrow else _row)(run.stages, sizes, facts, width)

    return drawing("The chain of models", draw)


def areas(stages: list[Stage]) -> list[float | None]:
    """What the squares' areas are: parameters of the image tower, or of both towers where one is unknown."""
    images = [stage.image_params for stage in stages]
    return images if all(images) else [stage.params for stage in stages]


def growth_ratio(stages: list[Stage], index: int) -> float | None:
    """How much larger stage `index` is than the one before, by `areas`; None where it does not grow from that."""
    started = index > 0 and stages[index].record.origin is not None
    before, now = areas(stages)[index - 1 : index + 1] if index and not started else (None, None)
    return now / before if before and now else None


def _side(size: float, largest: float, most: float) -> float:
    """Areas are as the numbers of parameters, but never too small to be seen."""
    return max(most * math.sqrt(size / largest), 20.0) if largest and size else 20.0


def _row(stages: list[Stage], sizes: list[float], facts: list[list[str]], width: float) -> tuple[float, Markup]:
    column = width / len(stages)
    most = min(column * 0.46, 120.0)
    base, parts = most + 12, []
    centres = [column * (i + 0.5) for i in range(len(stages))]
    sides = [_side(size, max(sizes), most) for size in sizes]
    for i, (stage, x, side) in enumerate(zip(stages, centres, sides, strict=True)):
        parts.append(_square(stage, x - side / 2, base - side, side))
        if ratio := growth_ratio(stages, i):
            left, right = centres[i - 1] + sides[i - 1] / 2 + 10, x - side / 2 - 10
            parts.append(_arrow(left, right, base - 10))
            middle = (left + right) / 2
            parts.append(label(middle, base - 20, f"×{digits(ratio, 2)}", "ratio", "middle"))
        room = column - 12
        name = stage.model if text_width(stage.model, 14.5) <= room else shortened([s.model for s in stages])[i]
        parts.append(label(x, base + 26, fitted(name, room, 14.5), f"model {colour(stage.index)}", "middle"))
        for n, line in enumerate(facts[i]):
            parts.append(label(x, base + 46 + 18 * n, fitted(line, room), "fact", "middle"))
    return base + 56 + 18 * max(len(lines) - 1 for lines in facts), join(parts)


def _column(stages: list[Stage], sizes: list[float], facts: list[list[str]], width: float) -> tuple[float, Markup]:
    y, parts, most = 4.0, [], 84.0
    for i, stage in enumerate(stages):
        if ratio := growth_ratio(stages, i):
            x = most / 2
            parts.append(tag("path", d=f"M{x:.1f} {y + 4:.1f}V{y + 30:.1f}m-5 -6l5 6l5 -6", class_="arrow"))
            parts.append(label(most + 18, y + 22, f"×{digits(ratio, 2)}", "ratio"))
            y += 38
        side, count = _side(sizes[i], max(sizes), most), len(facts[i])
        height = max(side, 22.0 + 17 * count)
        parts.append(_square(stage, most / 2 - side / 2, y + (height - side) / 2, side))
        top = y + (height - 22 - 17 * count) / 2 + 16
        parts.append(label(most + 18, top, fitted(stage.model, width - most - 18, 15), f"model {colour(stage.index)}"))
        for n, line in enumerate(facts[i]):
            parts.append(label(most + 18, top + 19 + 17 * n, fitted(line, width - most - 18), "fact"))
        y += height + 6
    return y, join(parts)


def _square(stage: Stage, x: float, y: float, side: float) -> Markup:
    state = "block" if stage.done else "block open" if stage.status != "failed" else "block open failed"
    title = tag("title", f"{stage.model}: {stage.status}")
    return tag("rect", title, x=x, y=y, width=side, height=side, rx=min(8.0, side / 5),
               class_=f"{state} {colour(stage.index)}")  # fmt: skip


def _arrow(left: float, right: float, y: float) -> Markup:
    if right - left < 12:
        return Markup("")
    return tag("path", d=f"M{left:.1f} {y:.1f}H{right:.1f}m-6 -5l6 5l-6 5", class_="arrow")


def _facts(run: Run, stage: Stage) -> list[str]:
    size = f"{digits(stage.params / 1e6)} M parameters" if stage.params else ""
    if stage.image_params and stage.params:
        size = f"{digits(stage.image_params / 1e6)} M of {size}"
    cost = f"{macs(stage.macs)} MACs" if stage.macs else ""
    lines = [size, " · ".join(part for part in (stage.length, cost) if part)]
    score = next(iter(run.measures), None)
    value = score.value(stage.metrics) if score else None
    if stage.status in MARKS:
        lines.append(MARKS[stage.status])
    elif score and value is not None:
        lines.append(f"{score.label.removeprefix('zero-shot ')} {score.written(value)}")
    return [line for line in lines if line]


def cost_bars(run: Run) -> Markup | None:
    """The chain's MACs, stage by stage, over the baseline's; None where either is unknown."""
    totals = run.record.totals or TotalsRecord()
    total, alone = amount(totals.macs), amount(totals.baseline_macs)
    parts_of = [stage.macs for stage in run.stages]
    if not total or not alone or not parts_of or None in parts_of:
        return None
    name, _ = baseline(run)
    spent_macs = sum(
        stage.macs or 0.0 if stage.done else stage.seen * (stage.macs_per_sample or 0.0) for stage in run.stages
    )
    spent_of = "" if all(stage.done for stage in run.stages) else f", {macs(spent_macs)} done"

    def draw(width: float, _: bool) -> tuple[float, Markup]:
        scale = (width - 2) / max(total, alone)
        x, parts = 0.0, [label(0.0, 13.0, f"the chain: {macs(total)} MACs{spent_of}", "bar-title")]
        names = shortened([stage.model for stage in run.stages])
        for stage, short_name in zip(run.stages, names, strict=True):
            if not stage.macs:  # a checkpoint that was given
                continue
            length = stage.macs * scale
            spent = 1.0 if stage.done else min(stage.seen * (stage.macs_per_sample or 0.0) / (stage.macs or 1.0), 1.0)
            title, hue = tag("title", f"{stage.model}: {macs(stage.macs)} MACs"), colour(stage.index)
            if spent < 1:
                parts.append(tag("rect", title, x=x + 0.6, y=21.6, width=max(length - 2.7, 0.5), height=24.8, rx=3,
                                 class_=f"fill lost {hue}"))  # fmt: skip
            parts.append(tag("rect", title, x=x, y=21, width=max(spent * length - 1.5, 0.0), height=26, rx=3,
                             class_=f"fill {hue}"))  # fmt: skip
            text = stage.model if text_width(stage.model) <= length - 12 else fitted(short_name, length - 8)
            parts.append(
                label(x + length / 2 - 0.75, 38.5, text, "on-fill" if spent > 0.6 else "on-fill lost", "middle")
            )
            x += length
        parts.append(label(0.0, 72.0, fitted(f"{name} alone: {macs(alone)} MACs", width), "bar-title"))
        parts.append(tag("rect", x=0, y=80, width=alone * scale, height=26, rx=3, class_="alone"))
        return 110.0, join(parts)

    return drawing("Training MACs of the chain and of the last model alone", draw)


def baseline(run: Run) -> tuple[str, str]:
    """What the chain is compared with: the model and how long it would train."""
    given = mapping(run.config.get("baseline"))
    last, first = run.stages[-1], next((stage for stage in run.stages if stage.length != "given"), run.stages[0])
    return str(given.get("model") or last.model), str(given.get("epochs") or first.length)
