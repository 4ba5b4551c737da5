"""The records of a run read back, and what the user sees of it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
import uuid
from itertools import combinations
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raychain.core import wording
from raychain.core.environment import environment
from raychain.core.storage import Folder
from raychain.evaluators.metrics import FORMER, written_down
from raychain.events import CATEGORIES, Evaluated, Span, StageEnded, StageStarted, Step, Warned
from raychain.records import RunRecord, StageEntry, TotalsRecord
from raychain.reporting import runlog
from raychain.reporting.progress import Progress
from raychain.reporting.runlog import RunLog
from raychain.reporting.table import result_table
from raychain.terminal import counting

HEADER = {"name": "demo", "config": {"train": {"lr": 1e-3}}, "environment": {"python": "3.11"}}
RECORD = {
    "key": "k" * 16,
    "index": 0,
    "model": "CoM-micro-S",
    "status": "trained",
    "epochs": 2,
    "steps": 8,
    "params": 311_234,
    "macs": 8.5e12,
    "wall_s": 3.24,
    "metrics": {"zero_shot_top1": 31.23, "i2t_r1": 12.3, "t2i_r1": 100.0},
}


def stage_start(stage=0, start_step=0, **changes):
    fields = {"model": "CoM-micro-S", "params": 311_234, "steps": 8, "global_batch": 128, "epoch_samples": 512}
    return StageStarted(stage=stage, start_step=start_step, **{"world_size": 1} | fields | changes)


def step(index, stage=0, loss=2.5, **changes):
    fields = {"task_loss": loss, "distill_loss": None, "alpha": 0.0, "lr": 1e-3, "report": {"logit_scale": 14.3}}
    fields |= {"samples_per_s": 64.0, "data_wait_s": 0.1, "world_size": 1}
    samples = 128 * (index + 1)
    place = {"stage": stage, "step": index + 1, "samples": samples, "epoch": samples / 512, "loss": loss}
    return Step(**place | fields | changes)


def span(name, category, start, end, stage=0):
    return Span(name, category, start, end, stage)


def log(folder, *events, stages=(None, None), finish=True):
    records = RunLog(folder, RunRecord.of(HEADER), [stage and StageEntry.of(stage) for stage in stages])
    for item in events:
        records.dispatch(item)
    if finish:
        records.finish("succeeded", TotalsRecord(macs=1.0))
    return records


def metric_lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def bars(path):
    return [e for e in json.loads((path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]


def scalars(path, run="stage0-CoM-micro-S"):
    return EventAccumulator(str(path / "tensorboard" / run)).Reload()


def test_run_json_follows_the_run_from_running_to_its_status(tmp_path):
    folder = Folder(str(tmp_path))
    records = log(folder, stage_start(), finish=False)
    assert folder.read_json("run.json") == {
        "schema": 1,
        "status": "running",
        **HEADER,
        "stages": [],
        "totals": {},
        "restarts": [],
        "evaluations": [],
    }
    records.dispatch(StageEnded(stage=1, record=StageEntry.of({"key": "b", "status": "failed", "loss": float("nan")})))
    records.dispatch(StageEnded(stage=0, record=StageEntry.of(RECORD)))
    now = folder.read_json("run.json")
    assert now["stages"] == [RECORD, {"key": "b", "status": "failed", "loss": None}]
    assert now["status"] == "running"
    records.finish("failed", TotalsRecord(macs=3))
    assert folder.read_json("run.json") == now | {"status": "failed", "totals": {"macs": 3}}
    assert records.run.content() == folder.read_json("run.json")
    assert not list(tmp_path.rglob("*.tmp"))


def test_reused_stages_stand_in_run_json_from_the_start(tmp_path):
    log(Folder(str(tmp_path)), stages=[RECORD, None], finish=False)
    assert Folder(str(tmp_path)).read_json("run.json")["stages"] == [RECORD]


def test_metrics_lines_carry_the_contract_keys_and_valid_json(tmp_path):
    log(Folder(str(tmp_path)), stage_start(), step(0), step(1, loss=float("nan")))
    first, second = metric_lines(tmp_path)
    keys = (
        "stage step samples epoch loss task_loss distill_loss alpha lr logit_scale samples_per_s data_wait_s world_size"
    )
    assert set(keys.split()) <= first.keys()
    assert (first["loss"], second["loss"]) == (2.5, None)


def test_evaluations_stand_in_run_json_and_those_after_a_resumed_step_are_measured_again(tmp_path):
    folder = Folder(str(tmp_path))
    measured = [Evaluated(stage=0, step=n, metrics={"zero_shot_top1": 1.0 * n}) for n in (4, 8)]
    log(folder, stage_start(), *measured, finish=False)
    log(folder, stage_start(0, 4), Evaluated(stage=0, step=8, metrics={"zero_shot_top1": 9.0}))
    found = folder.read_json("run.json")["evaluations"]
    assert [(e["stage"], e["step"], e["metrics"]) for e in found] == [
        (0, 4, {"zero_shot_top1": 4.0}),
        (0, 8, {"zero_shot_top1": 9.0}),
    ]


def test_a_resumed_stage_replaces_the_lines_it_runs_again_and_no_others(tmp_path):
    folder = Folder(str(tmp_path))
    log(folder, stage_start(), *map(step, range(8)), stage_start(1), *(step(i, 1) for i in range(6)), finish=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": 1, "step": 6, "lo')  # killed while writing
    log(folder, stage_start(1, 4), *(step(i, 1, loss=1.5) for i in range(4, 8)))
    lines = metric_lines(tmp_path)
    assert [(x["stage"], x["step"]) for x in lines] == [(stage, i + 1) for stage in (0, 1) for i in range(8)]
    assert [x["loss"] for x in lines if x["stage"] == 1] == [2.5] * 4 + [1.5] * 4


def test_tensorboard_has_the_losses_and_the_evaluations_over_samples(tmp_path):
    measured = Evaluated(stage=0, step=8, metrics={"zero_shot_top1": 31.25})
    log(Folder(str(tmp_path)), stage_start(), *map(step, range(8)), measured)
    read = scalars(tmp_path)
    assert [(s.step, s.value) for s in read.Scalars("loss")] == [(128 * (i + 1), 2.5) for i in range(8)]
    assert [(s.step, s.value) for s in read.Scalars("evaluation/zero_shot_top1")] == [(1024, 31.25)]
    assert "distill_loss" not in read.Tags()["scalars"]


@pytest.mark.parametrize("start", [0, 4])
def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path, start):
    folder = Folder(str(tmp_path))
    at_start = Evaluated(stage=0, step=4, metrics={"zero_shot_top1": 9.0})
    log(folder, stage_start(), *map(step, range(4)), at_start, step(4), step(5))
    time.sleep(1.1)  # TensorBoard reads event files in the order of their names, which hold whole seconds
    log(folder, stage_start(0, start), *(step(i, loss=1.5) for i in range(start, 8)))
    read = scalars(tmp_path)
    assert [s.step for s in read.Scalars("loss")] == [128 * (i + 1) for i in range(8)]
    assert [s.value for s in read.Scalars("loss")] == [2.5] * start + [1.5] * (8 - start)
    assert len(read.Scalars("evaluation/zero_shot_top1")) == (1 if start else 0)


def test_trace_is_valid_throughout_and_keeps_earlier_runs(tmp_path):
    folder = Folder(str(tmp_path))
    records = log(folder, finish=False)
    assert bars(tmp_path) == []
    records.dispatch(span("stage 0", "stage", 100.0, 103.5))
    records.dispatch(StageEnded(stage=0, record=StageEntry.of(RECORD)))
    log(folder, span("export", "export", 200.0, 200.25, None))
    assert [(b["name"], b["ts"], b["dur"]) for b in bars(tmp_path)] == [
        ("stage 0", 100_000_000, 3_500_000),
        ("export", 200_000_000, 250_000),
    ]
    named = {
        e["args"]["name"]
        for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        if e["ph"] == "M" and "name" in e["args"]
    }
    assert named == {"raychain demo", "stage", "export"}


def test_the_trace_of_a_driver_that_is_killed_lacks_the_last_seconds_alone(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: clock[0])
    records = log(Folder(str(tmp_path)), span("first", "export", 1.0, 2.0), finish=False)
    assert bars(tmp_path) == []
    clock[0] += runlog.TRACE_EVERY_S
    records.dispatch(span("second", "export", 3.0, 4.0))
    records.dispatch(span("third", "export", 5.0, 6.0))
    assert [bar["name"] for bar in bars(tmp_path)] == ["first", "second"]


def test_a_broken_trace_file_is_started_anew(tmp_path):
    (tmp_path / "trace.json").write_text('{"traceEvents": [')
    log(Folder(str(tmp_path)), span("build", "build", 1.0, 2.0))
    assert [b["name"] for b in bars(tmp_path)] == ["build"]


def test_bars_on_one_thread_are_apart_or_nested(tmp_path):
    times = [(0, 10), (2, 5), (3, 12), (5, 9), (8, 9), (11, 14), (10, 11), (4, 13)]
    log(Folder(str(tmp_path)), *(span(f"{t}", c, *t) for t in times for c in CATEGORIES[:3]))
    found = bars(tmp_path)
    assert len(found) == 3 * len(times)
    for a, b in combinations(found, 2):
        if a["tid"] == b["tid"]:
            assert a["cat"] == b["cat"]
            (s1, e1), (s2, e2) = ((x["ts"], x["ts"] + x["dur"]) for x in (a, b))
            assert e1 <= s2 or e2 <= s1 or (s1 <= s2 and e2 <= e1) or (s2 <= s1 and e1 <= e2)


def test_a_remote_folder_gets_files_now_and_then_and_all_of_them_at_the_end(tmp_path, monkeypatch):
    remote = Folder(f"memory://{uuid.uuid4().hex}/run")
    records = log(remote, stage_start(), step(0), finish=False)
    assert remote.read_json("run.json")["status"] == "running"
    assert not remote.read("metrics.jsonl")  # the first upload was a moment ago
    monkeypatch.setattr(runlog.time, "monotonic", lambda: 1e12)
    records.dispatch(step(1))
    assert len(remote.read("metrics.jsonl").splitlines()) == 2
    records.finish("succeeded", TotalsRecord())
    resumed = log(remote, stage_start(0, 1), step(1), step(2), span("export", "export", 1.0, 2.0))
    assert resumed.run.status == remote.read_json("run.json")["status"] == "succeeded"
    assert [json.loads(x)["step"] for x in remote.read("metrics.jsonl").splitlines()] == [1, 2, 3]
    assert len(remote.list("tensorboard/stage0-CoM-micro-S")) == 2
    read = scalars(remote.fetch("", tmp_path / "copy"))
    assert [s.step for s in read.Scalars("loss")] == [128, 256, 384]


def test_a_failed_upload_is_tried_again_and_does_not_stop_the_run(monkeypatch):
    remote = Folder(f"memory://{uuid.uuid4().hex}/run")
    with monkeypatch.context() as patch:
        patch.setattr(remote, "write", lambda *_: (_ for _ in ()).throw(OSError("storage is away")))
        records = log(remote, step(0), finish=False)
        with pytest.raises(OSError, match="away"):
            records.finish("failed", TotalsRecord())
    records = log(remote, step(0))
    assert remote.read_json("run.json")["status"] == "succeeded"


def test_environment_names_what_is_needed_to_repeat_a_run():
    found = environment()
    assert {"date", "python", "platform", "cpus", "gpus", "versions", "commit"} == found.keys()
    assert all(found["versions"][name] for name in ("raychain", "torch", "ray", "open_clip", "timm"))
    json.dumps(found, allow_nan=False)


def shown(*events, **console):
    file = io.StringIO()
    models = ["CoM-micro-S", "CoM-micro-S", "CoM-micro-L"]
    with Progress(models, Console(file=file, **{"width": 80, "force_terminal": False} | console)) as progress:
        for item in events:
            progress.dispatch(item)
    return file.getvalue()


def test_the_opening_line_says_when_pictures_are_cached_as_jpeg():
    opening = " ".join(shown(stage_start(cached_as="jpeg")).split())
    assert opening.endswith("pictures cached as JPEG")
    assert "JPEG" not in shown(stage_start(cached_as="raw"))


def test_plain_progress_prints_a_line_per_ten_seconds_and_stage():
    steps = [step(i, time=1000.0 + 2 * i) for i in range(12)]  # 22 seconds
    out = shown(stage_start(steps=12), *steps, StageEnded(stage=0, record=StageEntry.of(RECORD))).splitlines()
    assert out[0] == "stage 1/3 CoM-micro-S: 0.311 M parameters, 3 epochs, 12 steps on 1 worker"
    assert out[1] == "stage 1/3 CoM-micro-S: epoch 0.2/3 · loss 2.50 · 64.0 images/s · ETA 0:22"
    assert [line.split()[4] for line in out[1:4]] == ["0.2/3", "1.5/3", "2.8/3"]  # steps 0, 5 and 10
    assert out[4].endswith("trained · 8 steps in 0:03 · zero-shot top-1 31.2 %, i2t R@1 12.3 %, t2i R@1 100.0 %")
    assert len(out) == 5


def test_plain_progress_names_distillation_evaluation_warning_and_resume():
    grown = step(5, 1, loss=3.0, task_loss=2.0, distill_loss=0.5, alpha=2.0)
    measured = Evaluated(stage=1, step=6, metrics={"i2t_r1": 7.0})
    reused = StageEnded(stage=2, record=StageEntry(key="c", model="CoM-micro-L", status="reused"))
    out = shown(stage_start(1, 5, world_size=2), grown, measured, Warned(message="a [bold] word"), reused).splitlines()
    assert out[0].endswith("8 steps on 2 workers, resumed at step 5")
    assert "loss 3.00 (task 2.00, distill 0.500)" in out[1]
    assert out[2:] == [
        "stage 2/3 CoM-micro-S: step 6 · i2t R@1 7.0 %",
        "warning: a [bold] word",
        "stage 3/3 CoM-micro-L: reused",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_survives_odd_events(terminal):
    odd = [step(0, 7), stage_start(steps=0, epoch_samples=0), StageEnded(stage=1, record=None), None]
    odd += [stage_start(), step(0, samples_per_s=0), step(1, loss=None), Evaluated(stage=None, step=None, metrics={})]
    assert "stage 1/3 CoM-micro-S: 0.311 M parameters" in shown(*odd, force_terminal=terminal)


def test_terminal_progress_is_live_and_fits_its_width():
    grown = step(3, loss=3.0, task_loss=2.0, distill_loss=0.5, alpha=2.0)
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", shown(stage_start(), grown, force_terminal=True, color_system=None))
    printed, *_, top, below = out.splitlines()
    assert printed.startswith("stage 1/3 CoM-micro-S: 0.311 M parameters")
    assert max(len(top), len(below)) <= 80
    assert top.startswith("stage 1/3 CoM-micro-S ━")
    assert top.rstrip().endswith("50% ETA 0:08")
    assert below.strip() == "epoch 1.0/2 · loss 3.00 (task 2.00, distill 0.500) · 64.0 images/s"


RUN = {
    "stages": [
        RECORD,
        RECORD | {"index": 1, "model": "CoM-ViT-BL-16", "macs": 1.2e18, "wall_s": 12345.6},
        {"index": 2, "model": "ViT-B-16-SigLIP-i18n-256-with-a-long-name", "status": "failed", "metrics": None},
    ],
    "totals": {"macs": 1.3e18, "baseline_macs": 4e18, "percent_of_baseline": 32.5, "speedup": 3.077, "wall_s": 13000},
}


@pytest.mark.parametrize("width", [80, 120])
def test_result_table_fits_and_shows_each_stage_and_the_totals(width):
    console = Console(file=io.StringIO(), width=width)
    result_table(RUN, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    rows = [" ".join(line.split()) for line in lines]
    assert "1 CoM-micro-S trained 0.311 2 8.50 T 31.2 12.3 / 100.0 3.2" in rows
    assert "2 CoM-ViT-BL-16 trained 0.311 2 1.20 E 31.2 12.3 / 100.0 12,346" in rows
    assert [row for row in rows if row.startswith("3 ") and row.endswith("failed – – – – – –")]
    total = "total 1.30 E MACs, 32.5 % of the baseline's 4.00 E (planned) · 13,000 s"
    assert lines[-1].rstrip() == total


@pytest.mark.parametrize(
    ("defined", "measured", "heads"),
    [
        ((), {}, []),
        ((), {"i2t_r1": 12.3, "t2i_r1": 9.0}, ["R@1 %"]),
        (("retrieval",), {}, ["R@1 %"]),
        (("zero_shot",), {"zero_shot_top1": 31.2}, ["zero-shot"]),
        (("zero_shot", "retrieval"), {"zero_shot_top1": 31.2}, ["zero-shot", "R@1 %"]),
    ],
)
def test_result_table_has_no_column_of_what_nothing_measures(defined, measured, heads):
    definitions = [found for found in FORMER if found.kind in defined]
    run = RUN | {"stages": [RECORD | {"metrics": measured}], "metrics": written_down(definitions)}
    console = Console(file=io.StringIO(), width=80)
    result_table(run, console)
    text = console.file.getvalue()
    assert [head for head in ("zero-shot", "R@1 %") if head in text] == heads


def test_result_table_is_plain_where_stdout_is_no_terminal():
    code = f"from raychain.reporting.table import result_table; result_table({RUN!r})"
    environ = os.environ | {"FORCE_COLOR": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True)
    assert "\x1b" not in done.stdout
    assert "CoM-ViT-BL-16" in done.stdout


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.311234, "0.311"), (86.19, "86.2"), (12345.6, "12,346"), (None, "–"), (float("nan"), "–")],
)
def test_numbers_have_three_significant_digits(value, text):
    assert wording.number(value) == text


@pytest.mark.parametrize(("value", "text"), [(12, "12.0"), (999e3, "999 K"), (1e15, "1.00 P"), (2e28, "20,000 Y")])
def test_macs_have_their_unit(value, text):
    assert wording.macs(value) == text


def test_a_counting_line_is_printed_at_a_low_rate_where_there_is_no_terminal(capsys, monkeypatch):
    with counting.CountingLine("rows") as line:
        for done in range(100):
            line.show(done, 1000)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(counting, "PLAIN_EVERY_S", 0)
    with counting.CountingLine("rows") as line:
        line.show(1000, 2000, "3 failed")
    assert capsys.readouterr() == ("", "rows: 1,000 of 2,000, 3 failed\n")
