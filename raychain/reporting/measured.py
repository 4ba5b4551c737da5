"""What `raychain evaluate` prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raychain.errors import one_line
from raychain.evaluators.metrics import Definition, means, read_back
from raychain.terminal.console import make_console

HEADINGS = ("task", "data", "pictures", "result (%)")
LABELS = {"zero_shot": "zero-shot", "zero_shot_multilabel": "zero-shot, several labels", "retrieval": "retrieval"}


def measured_table(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the result of `raychain.evaluate` on stdout: a row for each task, percentages to two decimals."""
    console = console or make_console()
    console.print(
        f"{one_line(str(result['checkpoint']))}: {result['params'] / 1e6:.2f} M parameters, {_inputs(result)}, "
        f"{result['device']}, {result['seconds']:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    if result["results"]:
        _by_address(console, result["results"])
    if result.get("definitions"):
        _by_evaluator(console, read_back({"metrics": result["definitions"]}), result["metrics"])


def _inputs(result: Mapping[str, Any]) -> str:
    return f"{result['tokens']:,} tokens" if result.get("tokens") else f"{result['image_size']} px"


def _by_address(console: Console, rows: Iterable[Mapping[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading == "pictures" else "left", overflow="fold")
    for row in rows:
        what = f"{row['classes']:,} classes, {row['templates']:,} templates" if "classes" in row else "recall"
        pictures = f"{row['pictures']:,}"
        table.add_row(LABELS[row["task"]], Text(f"{one_line(row['data'])}\n{what}"), pictures, _numbers(row["metrics"]))
    console.print(table)


def _by_evaluator(console: Console, definitions: Sequence[Definition], metrics: Mapping[str, Any]) -> None:
    """A row for each metric that matters most; means over evaluators of a type below them."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("metric", "", "value"):
        table.add_column(heading, justify="right" if heading == "value" else "left", overflow="fold")
    for found in (d for d in definitions if d.brief):
        table.add_row(Text(found.label), found.unit, found.number(found.value(metrics)))
    for mean in means(definitions, metrics):
        table.add_row(Text(mean.definition.label, "bold"), mean.definition.unit, mean.definition.number(mean.value))
    console.print(table)


def _numbers(metrics: Mapping[str, float]) -> str:
    """`top-1 86.25  top-5 97.10`, `mAP 71.30`; recalls in a line for each direction."""
    if "map" in metrics:
        return f"mAP {metrics['map']:.2f}"
    if "zero_shot_top1" in metrics:
        return f"top-1 {metrics['zero_shot_top1']:.2f}  top-5 {metrics['zero_shot_top5']:.2f}"
    lines = []
    for direction, label in (("i2t", "image → text"), ("t2i", "text → image")):
        recalls = "  ".join(f"R@{k} {metrics[f'{direction}_r{k}']:.2f}" for k in (1, 5, 10))
        lines.append(f"{label}  {recalls}")
    return "\n".join(lines)
