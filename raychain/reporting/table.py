"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raychain.core.wording import MISSING, macs, number, percent, uncounted
from raychain.data.health import kinds
from raychain.errors import one_line
from raychain.evaluators.metrics import FORMER, Definition, means, read_back
from raychain.terminal.console import make_console

STATUS_STYLES = {"trained": "green", "reused": "cyan", "given": "cyan", "failed": "red"}
HEADINGS = ("stage", "model", "status", "params\n(M)", "epochs", "MACs")
COLUMNS = {"zero_shot": "zero-shot\ntop-1 %", "retrieval": "R@1 %\ni2t / t2i"}
"""What is measured and has a column of its own, by the evaluator's type."""
TEXT = ("model", "status")


def result_table(run: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the stages of a run.json and its totals on stdout; styled on a terminal only.

    It fits 80 columns with model names of up to 13 characters; longer ones fold where the terminal is too narrow.
    """
    console = console or make_console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1 if console.width >= 100 else 0), pad_edge=False, show_edge=False)
    metrics = read_back(run)
    stages = run.get("stages") or ()
    named = any(not definition.former for definition in metrics)
    columns = [] if named else _measured(run, stages)
    for heading in (*HEADINGS, *(COLUMNS[kind] for kind in columns), "seconds"):
        left = heading in TEXT
        model = heading == "model"
        table.add_column(heading, justify="left" if left else "right", no_wrap=not model, overflow="fold")
    for stage in stages:
        own = (_former(kind, stage.get("metrics") or {}) for kind in columns)
        table.add_row(*_row(stage), *own, number(stage.get("wall_s"), 2))
    console.print(table)
    if named:
        _metrics(console, stages, metrics)
    health = run.get("data_health") or {}
    if health.get("bad"):
        bad, samples = sum(health["bad"].values()), health["samples"]
        console.print(f"data: {bad:,} of {samples:,} samples not used: {kinds(health['bad'])}")
    for line in uncounted(stages):
        console.print(one_line(line), highlight=False, soft_wrap=True)
    console.print(_totals(run.get("totals") or {}), style="bold", highlight=False)


def _row(stage: Mapping[str, Any]) -> list[str | Text]:
    status = str(stage.get("status") or MISSING)
    index, params, epochs = stage.get("index"), stage.get("params"), stage.get("epochs")
    return [
        MISSING if index is None else str(index + 1),
        Text(str(stage.get("model") or MISSING)),
        Text(status, STATUS_STYLES.get(status, "")),
        number(None if params is None else params / 1e6),
        f"{epochs:.4g}" if isinstance(epochs, int | float) and status != "given" else MISSING,
        macs(stage.get("macs")),
    ]


def _measured(run: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The types of COLUMNS that the run measures; in files that do not say so, those of which there is a value."""
    defined = run.get("metrics")
    if isinstance(defined, Mapping) and defined:
        return [kind for kind in COLUMNS if any(found.kind == kind for found in read_back(run))]
    return [kind for kind in COLUMNS if any(_former(kind, stage.get("metrics") or {}) != MISSING for stage in stages)]


def _former(kind: str, metrics: Mapping[str, Any]) -> str:
    """The cell of zero-shot classification or of retrieval, where nothing else is measured."""
    cells = [found.number(found.value(metrics)) for found in FORMER if found.brief and found.kind == kind]
    return MISSING if set(cells) == {MISSING} else " / ".join(cells)


def _metrics(console: Console, stages: Sequence[Mapping[str, Any]], definitions: Sequence[Definition]) -> None:
    """A row for each metric that matters most, a column for each stage; means below them."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for heading in ("metric", "", *(str(stage.get("model") or MISSING) for stage in stages)):
        table.add_column(heading, justify="left" if heading in ("metric", "") else "right", overflow="fold")
    measured = [stage.get("metrics") or {} for stage in stages]
    for found in (d for d in definitions if d.brief):
        table.add_row(Text(found.label), found.unit, *(found.number(found.value(metrics)) for metrics in measured))
    of_stages = [{mean.definition: mean.value for mean in means(definitions, metrics)} for metrics in measured]
    for mean in dict.fromkeys(mean for found in of_stages for mean in found):
        values = (mean.number(found.get(mean)) for found in of_stages)
        table.add_row(Text(mean.label, "bold"), mean.unit, *values)
    console.print(table)


def _totals(totals: Mapping[str, Any]) -> str:
    share, baseline = percent(totals.get("percent_of_baseline")), macs(totals.get("baseline_macs"))
    return (
        f"total {macs(totals.get('macs'))} MACs, {share} % of the baseline's {baseline} (planned)"
        f" · {number(totals.get('wall_s'), 2)} s"
    )
