"""Spans as a Chrome trace, which Perfetto and chrome://tracing open."""

from __future__ import annotations

from collections.abc import Sequence

from raychain.core.json import Json
from raychain.events import CATEGORIES, Span
from raychain.records import BarRecord, TraceRecord, is_a

Bar = Json
"""An event of Chrome's trace format."""
PID = 1
LANES = 100  # thread ids set aside for a category


def bar(span: Span) -> Bar:
    """The complete event (`X`, microseconds) of a span; its thread is chosen by `document`."""
    start = round(span.start * 1e6)
    return {
        "name": span.name,
        "cat": span.category,
        "ph": "X",
        "ts": start,
        "dur": max(round(span.end * 1e6) - start, 0),
        "pid": PID,
        "args": {"stage": span.stage},
    }


def bars(record: TraceRecord | None) -> list[Bar]:
    """The complete events of a trace file; those that are none are left out."""
    return [event for event in record.traceEvents if is_a(event, BarRecord)] if record else []


def document(process: str, bars: Sequence[Bar]) -> Json:
    """The trace file's content: a thread per category, and more threads where its bars overlap without nesting."""
    names = [*CATEGORIES, *sorted({b["cat"] for b in bars} - set(CATEGORIES))]
    events: list[Bar] = [_name("process_name", 0, process)]
    for row, category in enumerate(names):
        lanes = _lanes([b for b in bars if b["cat"] == category])
        for number, lane in enumerate(lanes):
            tid = 1 + row * LANES + number
            events.append(_name("thread_name", tid, category if not number else f"{category} {number + 1}"))
            events.append({"name": "thread_sort_index", "ph": "M", "pid": PID, "tid": tid, "args": {"sort_index": tid}})
            events += [b | {"tid": tid} for b in lane]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(kind: str, tid: int, name: str) -> Bar:
    return {"name": kind, "ph": "M", "pid": PID, "tid": tid, "args": {"name": name}}


def _lanes(bars: Sequence[Bar]) -> list[list[Bar]]:
    """Bars over as few threads as first fit needs; on one thread any two are apart or one lies within the other."""
    lanes: list[list[Bar]] = []
    open_ends: list[list[int]] = []  # of each lane, ends of the bars not yet over, innermost last
    for b in sorted(bars, key=lambda b: (b["ts"], -b["dur"])):
        end = b["ts"] + b["dur"]
        for ends in open_ends:
            while ends and ends[-1] <= b["ts"]:
                ends.pop()
        free = (i for i, ends in enumerate(open_ends) if not ends or end <= ends[-1])
        if (lane := next(free, len(lanes))) == len(lanes):
            lanes.append([])
            open_ends.append([])
        lanes[lane].append(b)
        open_ends[lane].append(end)
    return lanes
