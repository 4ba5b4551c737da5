"""A run folder's records, written by the driver alone: run.json, metrics.jsonl, trace.json, TensorBoard files."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raychain import records
from raychain.core.storage import Folder, patiently
from raychain.errors import without_secrets
from raychain.reporting import trace
from raychain.reporting.events import Event
from raychain.reporting.scalars import Scalars

log = logging.getLogger("raychain.reporting")
SCHEMA = 1
UPLOAD_EVERY_S = 30.0
TRACE_EVERY_S = 10.0
"""How often trace.json is written, which is written anew each time; a killed driver loses the bars since then."""
RUN, METRICS, TRACE, TENSORBOARD = "run.json", "metrics.jsonl", "trace.json", "tensorboard"


class RunLog:
    """Turns events into the run folder's records. One thread of the driver calls it.

    `header` gives `name`, `config` and `environment` (more keys are kept). `stages` has one entry a stage of the chain:
    its record where it is reused, else None. Records of earlier calls on the same folder are continued: metrics.jsonl
    and trace.json are appended to, run.json is written anew with status `running`.

    In a local folder files are written in place. For a remote one they are written on a local disk and uploaded at most
    every 30 seconds, and in `finish`. What cannot be written (a full disk, storage that is away) is kept and tried
    again later; only `finish` raises its error.
    """

    def __init__(self, out: Folder, header: Mapping[str, Any], stages: Sequence[dict[str, Any] | None]) -> None:
        self._out = out
        self._scratch = None if out.local else tempfile.TemporaryDirectory(prefix="raychain-")
        self._folder = Folder(self._scratch.name) if self._scratch else out
        self._root = Path(self._folder.path)
        self._unwritten: list[bytes] = []
        self._refused: list[Callable[[dict[str, Any]], bool]] = []
        self._failing: set[str] = set()
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._upload_at = 0.0
        self._trace_at, self._traced = 0.0, -1
        self._stages = list(stages)
        first = {"schema": SCHEMA, "name": header["name"], "status": "running"}
        self._run = first | {k: v for k, v in header.items() if k not in first} | {"stages": [], "totals": {}}
        before = records.take(out, RUN, records.RunRecord) or {}
        self._run |= {key: before.get(key) or [] for key in ("restarts", "evaluations")}
        self._restart: Event | None = None
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

    @property
    def run(self) -> dict[str, Any]:
        """The content of run.json."""
        return self._run

    def handle(self, event: Event) -> None:
        """Records one event; kinds that leave no record are ignored."""
        with self._later("records"):
            self._record(event)
            if len(self._bars) != self._traced and time.monotonic() >= self._trace_at:
                self._write_trace()
        self._upload_if_due()

    def _record(self, event: Event) -> None:
        match event["event"]:
            case "stage_start":
                stage, first = event["stage"], event["start_step"]
                with self._later(TENSORBOARD):
                    self._scalars.start(event)
                if self._restart:
                    span = {"name": self._restart["reason"], "category": "restart", "stage": None}
                    self._bars.append(trace.bar(span | {"start": self._restart["time"], "end": event["time"]}))
                    self._restart = None
                self._keep_metrics(lambda line: line["stage"] != stage or line["step"] <= first)
                kept = [e for e in self._run["evaluations"] if e.get("stage") != stage or e.get("step", 0) <= first]
                self._run["evaluations"] = kept
            case "step":
                line = {k: v for k, v in event.items() if k != "event"}
                self._unwritten.append(json.dumps(plain(line), allow_nan=False).encode() + b"\n")
                with self._later(TENSORBOARD):
                    self._scalars.step(event)
                self._write_metrics()
            case "span":
                self._bars.append(trace.bar(event))
            case "evaluation":
                self._add_evaluation({k: event[k] for k in ("time", "stage", "step", "metrics")})
                self._write_run()
                with self._later(TENSORBOARD):
                    self._scalars.evaluation(event)
            case "restart":
                self._restart = dict(event)
                self._run["restarts"].append({k: event[k] for k in ("time", "reason", "workers", "message")})
                self._write_run()
            case "measured":
                self._stages[event["stage"]] = event["record"]
                self._write_run()
            case "stage_end":
                self._stages[event["stage"]] = event["record"]
                with self._later(TENSORBOARD):
                    self._scalars.flush()
                self._write_run()
                self._write_trace()

    def _add_evaluation(self, measured: dict[str, Any]) -> None:
        """Measurements come when they are done; they stand in the order of the steps."""
        place = measured["stage"], measured["step"]
        others = [e for e in self._run["evaluations"] if (e.get("stage"), e.get("step")) != place]
        for known in self._run["evaluations"]:
            if (known.get("stage"), known.get("step")) == place:  # by other evaluators, or before an interruption
                measured["metrics"] = {**(known.get("metrics") or {}), **measured["metrics"]}
        self._run["evaluations"] = sorted([*others, measured], key=lambda e: (e.get("stage") or 0, e.get("step") or 0))

    def note(self, key: str, value: Any) -> None:
        """Sets a top-level key of run.json, which is written with the next record."""
        self._run[key] = value

    def finish(self, status: str, totals: Mapping[str, Any]) -> None:
        """Writes everything with the final status (succeeded, failed, interrupted) and totals; no event comes after."""
        self._run |= {"status": status, "totals": dict(totals)}
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
        self._run["stages"] = [stage for stage in self._stages if stage is not None]
        self._run = plain(self._run)
        self._folder.write_json(RUN, self._run)

    def _write_trace(self) -> None:
        self._traced, self._trace_at = len(self._bars), time.monotonic() + TRACE_EVERY_S
        self._folder.write_json(TRACE, plain(trace.document(f"raychain {self._run['name']}", self._bars)))

    def _keep_metrics(self, keep: Callable[[dict[str, Any]], bool]) -> None:
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


def plain(value: Any) -> Any:
    """`value` as a record holds it: numbers that are not finite become None, other types their number or their text,
    and text loses the secrets of addresses."""
    match value:
        case None | bool() | int():
            return value
        case str():
            return without_secrets(value)
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(k): plain(v) for k, v in value.items()}
        case list() | tuple():
            return [plain(v) for v in value]
    try:
        return plain(float(value))
    except (TypeError, ValueError):
        return str(value)


def _passes(line: bytes, keep: Callable[[dict[str, Any]], bool]) -> bool:
    found = records.parse(line, records.StepRecord) if line.endswith(b"\n") else None
    return found is not None and keep(found)
