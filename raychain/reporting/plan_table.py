"""What `raychain plan` prints: the chain, its totals, the reasons for a proposal, warnings."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from raychain.core.wording import MISSING, about, clock, macs, number, several, uncounted
from raychain.evaluators.metrics import Definition
from raychain.terminal.console import make_console

HEADINGS = ("model", "image\nparams", "ratio", "all\nparams", "forward\nMACs", "epochs", "MACs", "share", "memory")
GIB = 2**30
BREACHES = {
    "smallest model": "another first model",
    "expansion ratios": "ratios outside of 2 to 4",
    "epochs": "fewer epochs than published",
}


def plan_table(plan: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a plan as `raychain.plan` returns it on stdout, in 80 columns; styled on a terminal only."""
    console = console or make_console()
    captions = plan["captions"]
    per_image = f", {captions} captions each" if captions > 1 else ""
    tokens = plan.get("sample_tokens") or 0
    per_text = f" of {tokens:,} tokens, {plan['samples'] * tokens:,} in all" if tokens else ""
    _say(console, f"{plan['name']}: {plan['samples']:,} samples{per_image}{per_text}", bold=True)
    console.print()
    hours = (plan.get("time") or {}).get("hours")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1 if console.width >= 100 else 0), pad_edge=False, show_edge=False)
    for heading in (*HEADINGS, *(["time"] if hours else [])):
        model, heading = heading == "model", heading.replace("image", plan.get("principal") or "image")
        table.add_column(heading, justify="left" if model else "right", no_wrap=not model, overflow="fold")
    for index, stage in enumerate(plan["stages"]):
        table.add_row(*_row(stage), *([clock(3600 * hours[index])] if hours else []))
    console.print(table)
    console.print()
    _totals(console, plan)
    _proposals(console, plan)
    for warning in plan["warnings"]:
        _say(console, f"warning: {warning}", style="yellow")
    for note in plan["notes"]:
        _say(console, f"note: {note}")


def _row(stage: Mapping[str, Any]) -> list[str]:
    ratio = stage["expansion_ratio"]
    return [
        stage["model"],
        f"{number(stage['image_params'] / 1e6)} M",
        MISSING if ratio is None else f"{ratio:.1f}",
        f"{number(stage['params'] / 1e6)} M",
        macs(stage["forward_macs"]),
        f"{stage['epochs']:.4g}" if stage["epochs"] else "given",
        macs(stage["macs"]),
        f"{100 * stage['share']:.1f} %",
        _memory(stage["memory_bytes"]),
    ]


def _memory(size: float | None) -> str:
    if size is None:
        return MISSING
    return f"{number(size / GIB, 2)} GiB" if size >= GIB else f"{number(size / 2**20, 2)} MiB"


def _totals(console: Console, plan: Mapping[str, Any]) -> None:
    baseline = plan["baseline"]
    epochs = several(baseline["epochs"], "epoch", "g")
    alone = f"{baseline['model']} alone for {epochs} ({macs(baseline['macs'])} MACs)"
    share = f"{plan['percent_of_baseline']:.1f} % of {alone}"
    _say(console, f"total {macs(plan['macs'])} MACs, {share}: speed-up {plan['speedup']:.2f}×", bold=True)
    given = uncounted(plan["stages"])
    for line in given:
        _say(console, line)
    if len(plan["stages"]) > 1 and not given:
        _say(console, f"all {len(plan['stages'])} models, against each alone: {plan['family_speedup']:.2f}×", bold=True)
    if time := plan.get("time"):
        each = f" ({about(3600 * time['worker_hours'])} of workers)" if plan["workers"] > 1 else ""
        _say(console, f"time: about {about(3600 * time['total_hours'])}{each}, from {time['basis']}")
    batch = f"{plan['workers']} workers" if plan["workers"] > 1 else "one worker"
    _say(console, f"memory: of each worker ({batch}); an estimate, without the framework's own")
    if prediction := plan.get("prediction"):
        _say(console, _predicted(prediction))


def _predicted(prediction: Mapping[str, Any]) -> str:
    if "reason" in prediction:
        return str(prediction["reason"])
    low, high, beyond = prediction["low"], prediction["high"], prediction["beyond"]
    outside = f"; {beyond:.1f} times beyond the measured costs, so doubtful" if beyond > 1.05 else ""
    metric = Definition(prediction["metric"], prediction["label"], prediction["unit"], "high")
    return (
        f"{metric.label} of {prediction['model']}: about {metric.written(prediction['value'])} "
        f"(95 %: {metric.number(low)} to {metric.number(high)}), from {prediction['points']} of your finished stages"
        f"{outside}"
    )


def _proposals(console: Console, plan: Mapping[str, Any]) -> None:
    if "proposals" not in plan:
        return
    console.print()
    _say(console, f"chosen of {plan['proposed_from']} chains:", bold=True)
    for reason in plan["why"]:
        _say(console, f"- {reason}")
    if len(plan["proposals"]) > 1:
        console.print()
        _say(console, "next:", bold=True)
    for proposal in plan["proposals"][1:]:
        breaks = f" ({', '.join(BREACHES[name] for name in proposal['breaks'])})" if proposal["breaks"] else ""
        stages = " → ".join(f"{stage['model']} {stage['epochs']:g}" for stage in proposal["chain"])
        _say(console, f"- {proposal['percent_of_baseline']:.1f} %, {proposal['speedup']:.2f}×: {stages}{breaks}")
    console.print()


def _say(console: Console, text: str, *, bold: bool = False, style: str = "") -> None:
    """A paragraph of at most the terminal's width, wrapped between words."""
    indent = "  " if text.startswith("- ") else ""
    wrapped = textwrap.fill(text, console.width, subsequent_indent=indent, break_on_hyphens=False)
    console.print(wrapped, style="bold" if bold else style, highlight=False, soft_wrap=True)
