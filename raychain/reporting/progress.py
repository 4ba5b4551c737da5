"""What the user sees while a run goes: a live bar on a terminal or in a notebook, else plain lines at a low rate."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raychain.core.wording import clock, number, several
from raychain.errors import one_line
from raychain.evaluators.metrics import FORMER, Definition
from raychain.events import BadSamples, Evaluated, Event, Listener, Restarted, StageEnded, StageStarted, Step, Warned
from raychain.records import StageEntry
from raychain.reporting.notebook import NotebookView, notebook_view
from raychain.terminal.console import make_console

PLAIN_EVERY_S = 10.0
SHOWN = 6
"""Metrics of a line."""


class Progress(Listener):
    """Shows events on stderr. Never raises over an event: what cannot be shown is left out."""

    def __init__(
        self, models: Sequence[str], console: Console | None = None, metrics: Sequence[Definition] = FORMER
    ) -> None:
        """`models` are those of the stages."""
        self.total_stages, self.metrics = len(models), metrics
        self.console = console or make_console(stderr=True)
        self._live: Live | None = None
        self._view: NotebookView | None = None
        self._starts: dict[int, StageStarted] = {}
        self._models = dict(enumerate(models))
        self._shown_at: dict[int, float] = {}
        self._bad: set[str] = set()

    def __enter__(self) -> Self:
        self._view = notebook_view()
        if self._view is None and self.console.is_terminal and not self.console.is_dumb_terminal:
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
        if self._view:
            self._view.now("", 0.0)
            self._view = None

    def dispatch(self, event: Event) -> None:
        """Shows one event. Raises nothing."""
        with suppress(Exception):  # a display is no reason to lose a run
            super().dispatch(event)

    def stage_started(self, event: StageStarted) -> None:
        """Says what will be trained."""
        self._starts[event.stage] = event
        self._shown_at.pop(event.stage, None)
        self._print(f"{self._title(event.stage)}: {_opening(event)}")
        if self._live:
            self._live.update(self._display(event, "waiting for the first step"))

    def step(self, event: Step) -> None:
        """Moves the bar on, or prints a line where the last one was some time ago."""
        start = self._starts[event.stage]
        if self._live:
            self._live.update(self._display(start, _losses(event), event))
            return
        if self._view:
            parts = [_epoch(start, event), _losses(event), _rate(event), f"ETA {_left(start, event)}"]
            told = f"{self._title(event.stage)}: {' · '.join(parts)}"
            self._view.now(told, event.step / max(start.steps, 1))
            return
        shown = self._shown_at.get(event.stage)
        if shown is None or abs(event.time - shown) >= PLAIN_EVERY_S:  # abs: another node's clock after a restart
            self._shown_at[event.stage] = event.time
            parts = [_epoch(start, event), _losses(event), _rate(event), f"ETA {_left(start, event)}"]
            self._print(f"{self._title(event.stage)}: {' · '.join(parts)}")

    def evaluated(self, event: Evaluated) -> None:
        """Says what was measured."""
        self._print(f"{self._title(event.stage)}: step {event.step:,} · {written(event.metrics, self.metrics)}")

    def stage_ended(self, event: StageEnded) -> None:
        """Says how the stage went."""
        if self._live:
            self._live.update(Text())
        if self._view:
            self._view.now("", 0.0)
        self._print(f"{self._title(event.stage)}: {_closing(event.record, self.metrics)}", "bold")

    def bad_samples(self, event: BadSamples) -> None:
        """Warns of a shard, once."""
        if event.identity not in self._bad:
            self._bad.add(event.identity)
            self._print(f"warning: {event.shard}: skipped {event.bad}", "yellow")

    def restarted(self, event: Restarted) -> None:
        """Says why the workers begin again."""
        self._print(event.message, "yellow")

    def warned(self, event: Warned) -> None:
        """Shows the warning."""
        self._print(f"warning: {event.message}", "yellow")

    def _display(self, start: StageStarted, losses: str, step: Step | None = None) -> Group:
        """Two lines: title, bar, ETA; below epoch, loss terms, rate."""
        done = step.step if step else start.start_step
        top = Table.grid(padding=(0, 1), expand=True)
        top.add_column(no_wrap=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True)
        eta = f"{done / max(start.steps, 1):4.0%} ETA {_left(start, step) if step else '–'}"
        top.add_row(Text(self._title(start.stage), "bold"), ProgressBar(start.steps, done), Text(eta, "cyan"))
        parts = [_epoch(start, step), losses, _rate(step)] if step else [losses]
        return Group(top, Text("  " + " · ".join(parts), no_wrap=True, overflow="ellipsis"))

    def _title(self, stage: int) -> str:
        model = self._models.get(stage)
        return f"stage {stage + 1}/{self.total_stages}" + (f" {model}" if model else "")

    def _print(self, text: str, style: str = "") -> None:
        if self._view:
            self._view.line(one_line(text))
            return
        self.console.print(Text(one_line(text), style), soft_wrap=True)


def _opening(start: StageStarted) -> str:
    params, steps, first, workers = number(start.params / 1e6), start.steps, start.start_step, start.world_size
    resumed = f", resumed at step {first:,}" if first else ""
    plural = "s" if workers != 1 else ""
    cached = ", pictures cached as JPEG" if start.cached_as == "jpeg" else ""
    length = f"{several(_epochs(start), 'epoch', '.4g')}, {several(steps, 'step')}"
    return f"{params} M parameters, {length} on {workers} worker{plural}{resumed}{cached}"


def _closing(record: StageEntry, metrics: Sequence[Definition]) -> str:
    parts = [str(record.status)]
    if record.status == "trained":
        parts.append(f"{record.steps:,} steps in {clock(record.wall_s)}")
    if record.metrics:
        parts.append(written(record.metrics, metrics))
    return " · ".join(parts)


def written(metrics: Mapping[str, float | None], definitions: Sequence[Definition]) -> str:
    """The metrics that matter most in a line; of many evaluators, the first ones and how many more there are."""
    known = [
        f"{d.label} {d.written(value)}" for d in definitions if d.brief and (value := d.value(metrics)) is not None
    ]
    known = known or [f"{key} {number(value)}" for key, value in metrics.items()]
    return ", ".join(known if len(known) <= SHOWN else [*known[:SHOWN], f"and {len(known) - SHOWN} more"])


def _losses(step: Step) -> str:
    total = f"loss {number(step.loss)}"
    if not step.alpha or step.distill_loss is None:
        return total
    return f"{total} (task {number(step.task_loss)}, distill {number(step.distill_loss)})"


def _epochs(start: StageStarted) -> float:
    return start.steps * start.global_batch / start.epoch_samples


def _epoch(start: StageStarted, step: Step) -> str:
    return f"epoch {step.epoch:.1f}/{_epochs(start):.4g}"


def _rate(step: Step) -> str:
    rate, unit = step.rate
    return f"{number(rate) if unit == 'images/s' else f'{rate:,.0f}'} {unit}"


def _left(start: StageStarted, step: Step) -> str:
    rate = step.samples_per_s
    return clock((start.steps - step.step) * start.global_batch / rate if rate else None)
