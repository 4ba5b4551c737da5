"""The parts of the page that are text: stages, faults and gaps, data health, environment, configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from raychain.core.json import Json
from raychain.core.wording import MISSING, clock, macs
from raychain.core.wording import number as digits
from raychain.evaluators.metrics import means
from raychain.pages.chain_drawing import growth_ratio
from raychain.pages.loading import Run, amount, count, mapping, number
from raychain.pages.markup import Markup, join, plain_text, tag
from raychain.pages.plot import colour
from raychain.pages.scales import span
from raychain.pages.terms import explained
from raychain.pages.timeline import Story
from raychain.records import HealthRecord

SHOWN = 50
"""Rows of a table of restarts, gaps or bad samples."""
Column = tuple[str, bool]
"""Heading, and whether it holds numbers."""


def table(columns: Sequence[Column], rows: Sequence[Sequence[object]], class_: str = "") -> Markup:
    """A table that is one card a row on phones; columns without a value in any row are left out."""
    used = [i for i in range(len(columns)) if any(row[i] not in (None, "", MISSING) for row in rows)]
    heading = _sorting if "sortable" in class_ else explained
    head = tag(
        "tr", *(tag("th", heading(columns[i][0]), scope="col", class_="num" if columns[i][1] else None) for i in used)
    )
    body = []
    for row in rows:
        cells = []
        for i in used:
            value = MISSING if row[i] in (None, "") else row[i]
            cells.append(tag("td", value, class_="num" if columns[i][1] else None, data_label=columns[i][0]))
        body.append(tag("tr", *cells))
    return tag("table", tag("thead", head), tag("tbody", *body), class_=f"cards {class_}".strip())


def _sorting(text: str) -> Markup:
    return tag("button", text, type="button", class_="sort")


STAGES: tuple[Column, ...] = (
    ("model", False), ("status", False), ("parameters", True), ("growth", True), ("epochs", True), ("steps", True),
    ("MACs", True),
)  # fmt: skip
TIMES: tuple[Column, ...] = (("time", True), ("gap", True), ("data wait", True))
FEW = 4
"""Metrics for which the table of stages has room."""


def stages(run: Run) -> Markup | None:
    """A row a stage."""
    if not run.stages:
        return None
    rows, measures = [], run.measures[:FEW]
    for i, stage in enumerate(run.stages):
        record, ratio = stage.record, growth_ratio(run.stages, i)
        wall, gap, wait = map(amount, (record.wall_s, record.gap_s, record.data_wait_s))
        steps, epochs = record.steps, record.epochs
        rows.append((
            tag("b", stage.model, class_=f"name {colour(i)}{' word' if len(stage.model) < 18 else ''}"),
            stage.status,
            f"{digits(stage.params / 1e6)} M" if stage.params else None,
            f"×{digits(ratio, 2)}" if ratio else None,
            f"{epochs:.4g}" if epochs is not None else stage.length,
            f"{steps:,.0f}" if steps is not None else _progress(stage.lines),
            macs(stage.macs),
            *(measure.number(measure.value(stage.metrics)) for measure in measures),
            None if wall is None else clock(wall),
            None if gap is None else span(gap),
            None if wait is None else span(wait),
        ))  # fmt: skip
    heads = [(f"{measure.label.removeprefix('zero-shot ')} {measure.unit}".strip(), True) for measure in measures]
    return table((*STAGES, *heads, *TIMES), rows)


def measured(run: Run) -> Markup | None:
    """A row a metric, a column a stage, and means over evaluators of a type; None where the stages' table says all."""
    done = [stage for stage in run.stages if stage.metrics]
    if len(run.measures) <= FEW or not done:
        return None
    rows = [(d.label, d.unit, *(d.number(d.value(stage.metrics)) for stage in done)) for d in run.measures]
    of_stages = [dict(means(run.measures, stage.metrics)) for stage in done]
    for mean in dict.fromkeys(definition for found in of_stages for definition in found):
        rows.append((tag("b", mean.label), mean.unit, *(mean.number(found.get(mean)) for found in of_stages)))
    return table((("metric", False), ("unit", False), *((stage.model, True) for stage in done)), rows)


def _progress(lines: Sequence[Json]) -> str | None:
    step = number(lines[-1].get("step")) if lines else None
    return None if step is None else f"{step:,.0f} so far"


def restarts(run: Run, tale: Story | None) -> Markup | None:
    """Faults and elastic changes: when, why, and the time until training went on."""
    found = run.record.restarts
    if not found:
        return None
    spans = {round(bar.start, 1): bar for bar in tale.bars if bar.category == "restart"} if tale else {}
    rows = []
    for restart in found[:SHOWN]:
        bar = spans.get(round(restart.time, 1))
        at = clock(restart.time - tale.start) if tale and restart.time >= tale.start else None
        until = span(bar.end - bar.start) if bar else None
        rows.append((at, restart.reason, f"{restart.workers}", until, restart.message))
    heads = (("at", True), ("reason", False), ("workers", True), ("until training", True), ("what happened", False))
    return join([table(heads, rows, "wordy"), _more(len(found))])


def gaps(tale: Story) -> Markup | None:
    """When training stood still, and for what."""
    found = tale.gaps
    if not found:
        return None
    longest = sorted(sorted(found, key=lambda gap: -gap.length)[:SHOWN], key=lambda gap: gap.start)
    rows = [(clock(gap.start - tale.start), span(gap.length), gap.why) for gap in longest]
    return join([table((("at", True), ("length", True), ("meanwhile", False)), rows, "wordy"), _more(len(found))])


def _more(found: int) -> Markup | None:
    return tag("p", f"and {found - SHOWN:,} more", class_="muted") if found > SHOWN else None


def data_health(run: Run) -> Markup | None:
    """What of the data could not be used; None where nothing is said about it."""
    health = run.record.data_health or HealthRecord()
    samples, shards = health.samples or 0, health.shards or 0
    if not samples and not shards:
        return None
    bad = {kind: found for kind, found in (health.bad or {}).items() if found}
    total = sum(bad.values())
    where = f"{samples:,} samples in {shards:,} shard{'s' if shards != 1 else ''}"
    limit = number(mapping(run.config.get("data")).get("max_bad_fraction"))
    if not total:
        return tag("p", tag("span", "✓ ", class_="good"), f"All {where} can be used.")
    share = total / max(samples, 1)
    allowed = f"; up to {limit:.2%} is allowed" if limit is not None else ""
    parts = [tag("p", tag("span", "! ", class_="warn"), f"{total:,} of {where} cannot be used ({share:.2%}{allowed}).")]
    kinds = sorted(bad.items(), key=lambda item: -item[1])[:SHOWN]
    parts.append(table((("what is wrong", False), ("samples", True)), [(kind, f"{n:,}") for kind, n in kinds]))
    examples = [
        (e.get("kind", ""), e.get("shard", "").rpartition("/")[2], e.get("key", ""), e.get("detail", ""))
        for e in (health.examples or ())[:SHOWN]
    ]
    if examples:
        heads = (("kind", False), ("shard", False), ("sample", False), ("detail", False))
        parts.append(tag("details", tag("summary", "Examples"), table(heads, examples, "wordy")))
    return join(parts)


def environment(run: Run) -> Markup | None:
    """What the run ran on."""
    found = run.record.environment
    if not found:
        return None
    gpus = [str(gpu) for gpu in found["gpus"]] if isinstance(found.get("gpus"), list) else []
    versions = [f"{name} {version}" for name, version in mapping(found.get("versions")).items() if version]
    entries = {
        "started": str(found.get("date") or "").replace("T", " "),
        "machine": " · ".join(
            part for part in (
                f"{count(found.get('cpus'))} CPU cores" if count(found.get("cpus")) else "",
                ", ".join(f"{gpus.count(gpu)} × {gpu}" for gpu in dict.fromkeys(gpus)) or "no GPU at the driver",
            ) if part
        ),
        "system": " · ".join(str(found[key]) for key in ("platform",) if found.get(key)),
        "versions": " · ".join([*([f"python {found['python']}"] if found.get("python") else []), *versions]),
        "commit": str(found.get("commit") or ""),
    }  # fmt: skip
    items = [part for key, value in entries.items() if value for part in (tag("dt", key), tag("dd", value))]
    return tag("dl", *items)


def configuration(run: Run) -> Markup | None:
    """The experiment as it was resolved, in YAML, without what is null."""
    config = _pruned(run.config)
    if not config:
        return None
    written = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)
    lines = plain_text(written).count("\n")
    return tag(
        "details",
        tag("summary", f"The resolved experiment, {lines:,} lines of YAML"),
        tag("pre", written, tabindex="0"),
    )


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        inner = {str(k): _pruned(v) for k, v in value.items()}
        return {k: v for k, v in inner.items() if v is not None and v != {}}
    return [_pruned(v) for v in value] if isinstance(value, list) else value
