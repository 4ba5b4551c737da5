"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raychain.feed.health import kinds
from raychain.reporting.console import make_console
from raychain.reporting.wording import MISSING, macs, number, percent

STATUS_STYLES = {"trained": "green", "reused": "cyan", "failed": "red"}
HEADINGS = ("stage", "model", "status", "params\n(M)", "epochs", "MACs")
MEASURED = ("zero-shot\ntop-1 %", "R@1 %\ni2t / t2i", "seconds")
TEXT = ("model", "status")


def result_table(run: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the stages of a run.json and its totals on stdout; styled on a terminal only.

    It fits 80 columns with model names of up to 13 characters; longer ones fold where the terminal is too narrow.
    """
    console = console or make_console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1 if console.width >= 100 else 0), pad_edge=False, show_edge=False)
    for heading in HEADINGS + MEASURED:
        left = heading in TEXT
        model = heading == "model"
        table.add_column(heading, justify="left" if left else "right", no_wrap=not model, overflow="fold")
    for stage in run.get("stages") or ():
        table.add_row(*_row(stage))
    console.print(table)
    health = run.get("data_health") or {}
    if health.get("bad"):
        bad, samples = sum(health["bad"].values()), health["samples"]
        console.print(f"data: {bad:,} of {samples:,} samples not used: {kinds(health['bad'])}")
    console.print(_totals(run.get("totals") or {}), style="bold", highlight=False)


def _row(stage: Mapping[str, Any]) -> list[str | Text]:
    metrics, status = stage.get("metrics") or {}, str(stage.get("status") or MISSING)
    index, params, epochs = stage.get("index"), stage.get("params"), stage.get("epochs")
    retrieval = [percent(metrics.get(key)) for key in ("i2t_r1", "t2i_r1")]
    return [
        MISSING if index is None else str(index + 1),
        Text(str(stage.get("model") or MISSING)),
        Text(status, STATUS_STYLES.get(status, "")),
        number(None if params is None else params / 1e6),
        f"{epochs:.4g}" if isinstance(epochs, int | float) else MISSING,
        macs(stage.get("macs")),
        percent(metrics.get("zero_shot_top1")),
        MISSING if set(retrieval) == {MISSING} else " / ".join(retrieval),
        number(stage.get("wall_s"), 2),
    ]


def _totals(totals: Mapping[str, Any]) -> str:
    share, baseline = percent(totals.get("percent_of_baseline")), macs(totals.get("baseline_macs"))
    return (
        f"total {macs(totals.get('macs'))} MACs, {share} % of the baseline's {baseline}"
        f" · speed-up {number(totals.get('speedup'))}× · {number(totals.get('wall_s'), 2)} s"
    )
