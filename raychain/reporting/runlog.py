"""A run folder's records, written by the driver alone: run.json, metrics.jsonl, trace.json, TensorBoard files."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from raychain import records
from raychain.core.json import plain
from raychain.core.storage import Folder, patiently
from raychain.events import Evaluated, Event, Listener, Measured, Restarted, Span, StageEnded, StageStarted, Step
from raychain.records import EvaluationRecord, RestartRecord, RunRecord, StageEntry, StepRecord, TotalsRecord
from raychain.reporting import trace
from raychain.reporting.scalars import Scalars

log = logging.getLogger("raychain.reporting")
UPLOAD_EVERY_S = 30.0
TRACE_EVERY_S = 10.0
"""How often trace.json is written, which is written anew each time; a killed driver loses the bars since then."""
RUN, METRICS, TRACE, TENSORBOARD = "run.json", "metrics.jsonl", "trace.json", "tensorboard"


class RunLog(Listener):
    """Turns events into the run folder's records. One thread of the driver calls it.

    `header` is run.json as far as it is known before. `stages` has one entry a stage of the chain:
    its record where it is reused, else None. Records of earlier calls on the same folder are continued: metrics.jsonl
    and trace.json are appended to, run.json is written anew with status `running`.

    In a local folder files are written in place. For a remote one they are written on a local disk and uploaded at most
    every 30 seconds, and in `finish`. What cannot be written (a full disk, storage that is away) is kept and tried
    again later; only `finish` raises its error.
    """

    def __init__(self, out: Folder, header: RunRecord, stages: Sequence[StageEntry | None]) -> None:
        self._out = out
        self._scratch = None if out.local else tempfile.TemporaryDirectory(prefix="raychain-")
        self._folder = Folder(self._scratch.name) if self._scratch else out
        self._root = Path(self._folder.path)
        self._unwritten: list[bytes] = []
        self._refused: list[Callable[[StepRecord], bool]] = []
        self._failing: set[str] = set()
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._upload_at = 0.0
        self._trace_at, self._traced = 0.0, -1
        self._stages = list(stages)
        before = records.take(out, RUN, RunRecord) or RunRecord()
        self._restarts, self._evaluations = list(before.restarts or ()), list(before.evaluations or ())
        self.run = header.model_copy(update={"status": "running", "stages": [], "totals": TotalsRecord()})
        """The content of run.json."""
        self._restart: Restarted | None = None
        self._bars = trace.bars(records.take(out, TRACE, records.TraceRecord))
        self._scalars = Scalars(self._root / TENSORBOARD)
        earlier = records.content(out, METRICS)
        if earlier is None and records.is_taken(out, METRICS):
            log.warning("%s: %s is no file; kept as %s", out.address, METRICS, records.set_aside(out, METRICS))
        if self._scratch and earlier is not None:
            self._folder.write(METRICS, earlier)
        self._keep_metrics(lambda _: True)
        self._write_run()
        self._write_trace()
        self._upload_if_due()

    def dispatch(self, event: Event) -> None:
        """Records one event."""
        with self._later("records"):
            super().dispatch(event)
            if len(self._bars) != self._traced and time.monotonic() >= self._trace_at:
                self._write_trace()
        self._upload_if_due()

    def stage_started(self, event: StageStarted) -> None:
        """Drops what the stage will record again, and draws the restart that it ends."""
        stage, first = event.stage, event.start_step
        with self._later(TENSORBOARD):
            self._scalars.dispatch(event)
        if self._restart:
            self._bars.append(trace.bar(Span(self._restart.reason, "restart", self._restart.time, event.time)))
            self._restart = None
        self._keep_metrics(lambda line: line.stage != stage or line.step <= first)
        self._evaluations = [found for found in self._evaluations if found.stage != stage or found.step <= first]

    def step(self, event: Step) -> None:
        """Writes a line of metrics.jsonl."""
        line: dict[str, float | None] = {
            "time": event.time,
            "stage": event.stage,
            "step": event.step,
            "samples": event.samples,
            "epoch": event.epoch,
            **event.scalars(),
        }
        self._unwritten.append(json.dumps(plain(line), allow_nan=False).encode() + b"\n")
        with self._later(TENSORBOARD):
            self._scalars.dispatch(event)
        self._write_metrics()

    def span(self, event: Span) -> None:
        """Adds a bar to the trace."""
        self._bars.append(trace.bar(event))

    def evaluated(self, event: Evaluated) -> None:
        """Adds the measurement; they come when they are done, and stand in the order of the steps."""
        metrics, place = plain(event.metrics), (event.stage, event.step)
        for known in self._evaluations:
            if (known.stage, known.step) == place:  # by other evaluators, or before an interruption
                metrics = {**known.metrics, **metrics}
        others = [found for found in self._evaluations if (found.stage, found.step) != place]
        measured = EvaluationRecord(time=event.time, stage=event.stage, step=event.step, metrics=metrics)
        self._evaluations = sorted([*others, measured], key=lambda found: (found.stage, found.step))
        self._write_run()
        with self._later(TENSORBOARD):
            self._scalars.dispatch(event)

    def restarted(self, event: Restarted) -> None:
        """Adds the restart, whose bar ends when the next group begins."""
        self._restart = event
        self._restarts.append(
            RestartRecord(time=event.time, reason=event.reason, workers=event.workers, message=event.message)
        )
        self._write_run()

    def measured(self, event: Measured) -> None:
        """Completes the stage's record."""
        self._stages[event.stage] = event.record
        self._write_run()

    def stage_ended(self, event: StageEnded) -> None:
        """Adds the stage's record."""
        self._stages[event.stage] = event.record
        with self._later(TENSORBOARD):
            self._scalars.dispatch(event)
        self._write_run()
        self._write_trace()

    def finish(self, status: str, totals: TotalsRecord) -> None:
        """Writes everything with the final status (succeeded, failed, interrupted) and totals; no event comes after."""
        self.run.status, self.run.totals = status, totals
        patiently(self._write_all, str(self._root))
        with self._later(TENSORBOARD):
            self._scalars.close()
        if self._scratch:
            self._upload()
            self._scratch.cleanup()

    def _write_all(self) -> None:
        self._write_metrics()
        self._write_run()
        self._write_trace()

    @contextlib.contextmanager
    def _later(self, what: str) -> Iterator[None]:
        """A disk that takes nothing now is no reason to end a run."""
        try:
            yield
        except OSError as error:
            if what not in self._failing:
                log.warning("%s: %s cannot be written, training goes on: %s", self._root, what, error)
            self._failing.add(what)
        else:
            self._failing.discard(what)

    def _write_run(self) -> None:
        self.run.stages = [stage for stage in self._stages if stage is not None]
        self.run.restarts, self.run.evaluations = self._restarts, self._evaluations
        records.write(self._folder, RUN, self.run)

    def _write_trace(self) -> None:
        self._traced, self._trace_at = len(self._bars), time.monotonic() + TRACE_EVERY_S
        self._folder.write_json(TRACE, plain(trace.document(f"raychain {self.run.name}", self._bars)))

    def _keep_metrics(self, keep: Callable[[StepRecord], bool]) -> None:
        """Drops the lines of metrics.jsonl that `keep` refuses, and a half-written one."""
        self._refused.append(keep)
        self._unwritten = [line for line in self._unwritten if _passes(line, keep)]
        self._write_metrics()

    def _write_metrics(self) -> None:
        """Brings metrics.jsonl up to date; what fails is done by the next call."""
        if self._refused:
            content = self._folder.read(METRICS) or b""
            lines = content.splitlines(keepends=True)
            kept = b"".join(line for line in lines if all(_passes(line, keep) for keep in self._refused))
            if kept != content:
                self._folder.write(METRICS, kept)
            self._refused = []
        if not self._unwritten:
            return
        with (self._root / METRICS).open("ab", buffering=0) as file:
            size, content = file.seek(0, os.SEEK_END), b"".join(self._unwritten)
            if (written := file.write(content)) != len(content):
                file.truncate(size)
                raise OSError(errno.ENOSPC, f"{written} of {len(content)} bytes written", METRICS)
        self._unwritten = []

    def _upload_if_due(self) -> None:
        if self._scratch and time.monotonic() >= self._upload_at:
            try:
                self._upload()
            except Exception:  # drivers raise their own kinds; the storage may be back soon, and training goes on
                self._upload_at = time.monotonic() + UPLOAD_EVERY_S

    def _upload(self) -> None:
        self._scalars.flush()
        for path in sorted(p for p in self._root.rglob("*") if p.is_file()):
            name, stat = path.relative_to(self._root).as_posix(), path.stat()
            version = (stat.st_mtime_ns, stat.st_size)
            if self._uploaded.get(name) != version:
                self._out.write(name, path.read_bytes())
                self._uploaded[name] = version
        self._upload_at = time.monotonic() + UPLOAD_EVERY_S


def _passes(line: bytes, keep: Callable[[StepRecord], bool]) -> bool:
    found = records.parse(line, StepRecord) if line.endswith(b"\n") else None
    return found is not None and keep(found)
