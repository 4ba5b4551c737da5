"""What the user sees while a run goes: a live bar on a terminal, plain lines at a low rate elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raychain.core.wording import clock, number
from raychain.data.health import Tally
from raychain.errors import one_line
from raychain.evaluators.metrics import FORMER, Definition
from raychain.reporting.events import Event
from raychain.terminal.console import make_console

PLAIN_EVERY_S = 10.0
SHOWN = 6
"""Metrics of a line."""


class Progress:
    """Shows events on stderr. Never raises over an event: what cannot be shown is left out."""

    def __init__(
        self, total_stages: int, console: Console | None = None, metrics: Sequence[Definition] = FORMER
    ) -> None:
        self.total_stages, self.metrics = total_stages, metrics
        self.console = console or make_console(stderr=True)
        self._live: Live | None = None
        self._starts: dict[int, Event] = {}
        self._shown_at: dict[int, float] = {}
        self._bad: set[str] = set()

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            # stdout carries results: it is only drawn around when it is the same terminal
            same = sys.stdout.isatty()
            self._live = Live(console=self.console, transient=True, redirect_stdout=same, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def handle(self, event: Event) -> None:
        """Shows one event."""
        with suppress(Exception):  # a display is no reason to lose a run
            self._show(event)

    def _show(self, event: Event) -> None:
        match event["event"]:
            case "stage_start":
                self._starts[event["stage"]] = event
                self._shown_at.pop(event["stage"], None)
                self._print(f"{self._title(event['stage'])}: {_opening(event)}")
                if self._live:
                    self._live.update(self._display(event, "waiting for the first step"))
            case "step":
                self._step(event)
            case "evaluation":
                measured = written(event["metrics"], self.metrics)
                self._print(f"{self._title(event['stage'])}: step {event['step']:,} · {measured}")
            case "stage_end":
                if self._live:
                    self._live.update(Text())
                record = event["record"]
                self._starts.setdefault(event["stage"], {"model": record["model"]})
                self._print(f"{self._title(event['stage'])}: {_closing(record, self.metrics)}", "bold")
            case "bad_samples":
                if event["identity"] not in self._bad:
                    self._bad.add(event["identity"])
                    self._print(f"warning: {event['shard']}: skipped {Tally.from_dict(event['bad'])}", "yellow")
            case "restart":
                self._print(event["message"], "yellow")
            case "warning":
                self._print(f"warning: {event['message']}", "yellow")

    def _step(self, event: Event) -> None:
        start = self._starts[event["stage"]]
        if self._live:
            self._live.update(self._display(start, _losses(event), event))
            return
        now = event.get("time") or time.time()
        shown = self._shown_at.get(event["stage"])
        if shown is None or abs(now - shown) >= PLAIN_EVERY_S:  # abs: another node's clock after a restart
            self._shown_at[event["stage"]] = now
            parts = [_epoch(start, event), _losses(event), _rate(event), f"ETA {_left(start, event)}"]
            self._print(f"{self._title(event['stage'])}: {' · '.join(parts)}")

    def _display(self, start: Event, losses: str, step: Event | None = None) -> Group:
        """Two lines: title, bar, ETA; below epoch, loss terms, rate."""
        done = step["step"] if step else start["start_step"]
        top = Table.grid(padding=(0, 1), expand=True)
        top.add_column(no_wrap=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True)
        eta = f"{done / max(start['steps'], 1):4.0%} ETA {_left(start, step) if step else '–'}"
        top.add_row(Text(self._title(start["stage"]), "bold"), ProgressBar(start["steps"], done), Text(eta, "cyan"))
        parts = [_epoch(start, step), losses, _rate(step)] if step else [losses]
        return Group(top, Text("  " + " · ".join(parts), no_wrap=True, overflow="ellipsis"))

    def _title(self, stage: int) -> str:
        model = self._starts.get(stage, {}).get("model")
        return f"stage {stage + 1}/{self.total_stages}" + (f" {model}" if model else "")

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(one_line(text), style), soft_wrap=True)


def _opening(start: Event) -> str:
    params, steps, first = number(start["params"] / 1e6), start["steps"], start["start_step"]
    workers = start["world_size"]
    resumed = f", resumed at step {first:,}" if first else ""
    plural = "s" if workers != 1 else ""
    cached = ", pictures cached as JPEG to fit preload.budget" if start.get("cached_as") == "jpeg" else ""
    length = f"{_epochs(start):.4g} epochs, {steps:,} steps"
    return f"{params} M parameters, {length} on {workers} worker{plural}{resumed}{cached}"


def _closing(record: Event, metrics: Sequence[Definition]) -> str:
    parts = [str(record["status"])]
    if record["status"] == "trained":
        parts.append(f"{record['steps']:,} steps in {clock(record.get('wall_s'))}")
    if record.get("metrics"):
        parts.append(written(record["metrics"], metrics))
    return " · ".join(parts)


def written(metrics: dict[str, float], definitions: Sequence[Definition]) -> str:
    """The metrics that matter most in a line; of many evaluators, the first ones and how many more there are."""
    known = [
        f"{d.label} {d.written(value)}" for d in definitions if d.brief and (value := d.value(metrics)) is not None
    ]
    known = known or [f"{key} {number(value)}" for key, value in metrics.items()]
    return ", ".join(known if len(known) <= SHOWN else [*known[:SHOWN], f"and {len(known) - SHOWN} more"])


def _losses(step: Event) -> str:
    total = f"loss {number(step['loss'])}"
    if not step.get("alpha") or step.get("distill_loss") is None:
        return total
    task, distill = (number(step[key]) for key in ("task_loss", "distill_loss"))
    return f"{total} (task {task}, distill {distill})"


def _epochs(start: Event) -> float:
    return float(start["steps"] * start["global_batch"] / start["epoch_samples"])


def _epoch(start: Event, step: Event) -> str:
    return f"epoch {step['epoch']:.1f}/{_epochs(start):.4g}"


def _rate(step: Event) -> str:
    return f"{number(step['samples_per_s'])} images/s"


def _left(start: Event, step: Event) -> str:
    rate = step["samples_per_s"]
    return clock((start["steps"] - step["step"]) * start["global_batch"] / rate if rate else None)
