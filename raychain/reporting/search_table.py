"""The table at the end of a search."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raychain.core.wording import macs, number
from raychain.evaluators.metrics import Definition, find, read_back
from raychain.records import ChainedRecord
from raychain.reporting.search_progress import describe
from raychain.terminal.console import make_console

SHOWN = 30
"""Trials, the best ones."""
KINDS = {"planned": "planner", "sampled": "", "control": "alone", "equal-macs": "equal MACs", "full": "in full"}


def search_table(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a search.json on stdout: trials from the best on, the best chain against models alone, what was shared."""
    console = console or make_console()
    metric = find(read_back(result), result["metric"], "metric")
    best, front = result["best"], {trial["number"] for trial in result["pareto"]}

    def order(trial: Mapping[str, Any]) -> tuple[float, float]:
        value = metric.value(trial["metrics"])
        return (math.inf if value is None else -metric.rank(value)), trial["macs"]

    trials = sorted(result["trials"], key=order)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for heading in (
        "",
        "trial",
        "chain and epochs",
        "",
        "MACs",
        "% of\nbase",
        f"{metric.label}\n{metric.unit}".strip(),
    ):
        left = heading in ("", "chain and epochs")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading == "MACs", overflow="fold")
    for trial in trials[:SHOWN]:
        mark = "★" if best and trial["number"] == best["number"] else "·" if trial["number"] in front else ""
        succeeded = trial["status"] == "succeeded"
        value = metric.number(metric.value(trial["metrics"])) if succeeded else trial["status"]
        table.add_row(
            mark,
            str(trial["number"]),
            Text(describe([ChainedRecord.of(stage) for stage in trial["chain"]]) + _varied(trial)),
            KINDS[trial["kind"]],
            macs(trial["macs"]),
            number(100 * trial["macs"] / result["baseline"]["macs"], 2),
            value,
        )
    console.print(table)
    hidden = f"; {len(trials) - SHOWN} more in search.json" if len(trials) > SHOWN else ""
    _say(console, f"★ best chain, · on the front of {metric.label} and MACs{hidden}")
    base = result["baseline"]
    _say(console, f"base: {base['model']} alone, {macs(base['macs'])} MACs")
    for found in result["comparisons"]:
        _say(console, f"against {found['model']} alone: {_against(found, metric)}")
    if result["proxy"]:
        _say(console, _proxy(result["proxy"]))
    chains = _share(**result["stage_epochs_of_chains"])
    everything = _share(result["stage_epochs_requested"], result["stage_epochs_trained"])
    _say(console, f"stages shared: {chains} in the chains, {everything} with the models alone")


def _varied(trial: Mapping[str, Any]) -> str:
    """What was chosen of the transfer and the learning rates."""
    names = ("width", "depth", "shrink", "alpha", "warmup", "lr_scale")
    found = [f"{name} {trial['params'][name]}" for name in names if name in trial["params"]]
    rates = [f"{trial['params'][name]:g}" for s in trial["chain"] if (name := f"lr.{s['model']}") in trial["params"]]
    found += [f"lr {' → '.join(rates)}"] if rates else []
    return f" ({', '.join(found)})" if found else ""


def _against(found: Mapping[str, Any], metric: Definition) -> str:
    parts = []
    for name, words in (("at_equal_macs", "for no more MACs"), ("at_most", "at its best")):
        if control := found[name]:
            lead = control["chain_is_ahead_by"]
            by = f"{'ahead' if lead > 0 else 'behind'} by {metric.number(abs(lead))}"
            verdict = by if abs(lead) > metric.tie else "equal"
            reached = f"{metric.written(metric.value(control))} ({macs(control['macs'])} MACs)"
            parts.append(f"{words} it reaches {reached}: the chain is {verdict}")
    return "; ".join(parts)


def _proxy(proxy: Mapping[str, Any]) -> str:
    checked, correlation = len(proxy["checked"]), proxy["rank_correlation"]
    if correlation is None:
        return f"proxy: {checked} trials were trained in full, too few or too much alike to tell whether it ranks alike"
    return f"proxy: rank correlation {correlation:.2f} with {checked} trials in full"


def _share(requested: float, trained: float) -> str:
    return f"{trained:g} epochs trained of {requested:g}" + (
        f" ({100 * trained / requested:.0f} %)" if requested else ""
    )


def _say(console: Console, text: str) -> None:
    console.print(textwrap.fill(text, console.width, break_on_hyphens=False), highlight=False)
