"""The page of a run or a search: complete, well-formed, self-contained, and safe whatever the run folder holds."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import raychain
from raychain.cli.commands import commands
from raychain.core.storage import Folder
from raychain.errors import InputError
from raychain.pages import scales, search_json, timeline
from raychain.pages.loading import read
from raychain.pages.markup import NARROW, WIDE, escape, plain_text, text_width
from raychain.pages.page import page
from raychain.pages.plot import shortened, spread
from raychain.pages.writing import leave_report

T0 = 1_700_000_000.0
DISTILL = {"width": "centred", "depth": "identity", "distill": {"alpha": 2.0, "cap": True}}


def run_json(**changes: Any) -> dict[str, Any]:
    records = [
        {
            "index": i,
            "key": f"key {i}",
            "model": f"CoM-micro-{size}",
            "status": "trained",
            "epochs": 2.0,
            "steps": 100,
            "gap_s": 1.5,
            "samples_seen": 6400,
            "params": 3_000_000 * (i + 1),
            "macs": 10**12 * (i + 1),
            "wall_s": 50.0,
            "data_wait_s": 0.1,
            "metrics": {"zero_shot_top1": 20.0 + 10 * i, "i2t_r1": 40.0, "t2i_r1": 15.0},
        }
        for i, size in enumerate("SM")
    ]
    return {
        "schema": 1,
        "name": "tiny",
        "status": "succeeded",
        "config": {
            "chain": [{"model": r["model"], "epochs": "2 epochs"} for r in records],
            "data": {"train": [{"shards": ["s3://key:hunter2@bucket/x"]}], "max_bad_fraction": 0.01},
            "train": {"global_batch": 64},
            "transfer": DISTILL,
        },
        "environment": {
            "date": "2026-01-01T00:00:00+00:00",
            "cpus": 2,
            "gpus": ["H100", "H100"],
            "versions": {"ray": "2"},
        },
        "data_health": {
            "shards": 2,
            "samples": 3200,
            "bad": {"unreadable picture": 3},
            "examples": [{"shard": "/a/0.tar", "key": "7", "kind": "unreadable picture", "detail": ""}],
        },
        "stages": records,
        "totals": {"macs": 3e12, "baseline_macs": 9e12, "percent_of_baseline": 33.33, "speedup": 3.0, "wall_s": 100},
        "restarts": [{"time": T0 + 50.0, "reason": "failure", "workers": 2, "message": "a node was lost"}],
        "evaluations": [{"time": T0, "stage": 0, "step": 50, "metrics": {"zero_shot_top1": 11.0}}],
    } | changes


def line(stage: int, step: int, time: float, **changes: Any) -> dict[str, Any]:
    return {
        "time": time,
        "stage": stage,
        "step": step,
        "samples": 64 * step,
        "epoch": step / 50,
        "loss": 3.0,
        "task_loss": 3.0 - step / 100,
        "distill_loss": 0.2 * stage,
        "world_size": 2,
        "samples_per_s": 128.0,
    } | changes


def bar(category: str, name: str, start: float, end: float, stage: int | None = 0) -> dict[str, Any]:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "ts": (T0 + start) * 1e6,
        "dur": (end - start) * 1e6,
        "pid": 1,
        "args": {"stage": stage},
    }


LINES = [line(s, step, T0 + 60 * s + step / 2) for s in (0, 1) for step in range(10, 101, 10)]
TRACE = [
    bar("stage", "CoM-micro-S", 0, 50),
    bar("evaluation", "evaluate CoM-micro-S", 50, 52),
    bar("build", "build", -2, 0),
    bar("restart", "failure", 50, 60, None),
    bar("stage", "CoM-micro-M", 60, 110, 1),
    bar("checkpoint", "checkpoint 10", 20, 21),
]


def write(
    folder: Path, run: Any = None, lines: Any = LINES, trace: Any = TRACE, search: dict[str, Any] | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))
    if lines is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    if trace is not None:
        (folder / "trace.json").write_text(json.dumps({"traceEvents": trace}))
    if search is not None:
        (folder / "search.json").write_text(json.dumps(search))
    return folder


def made(folder: Path) -> ElementTree.Element:
    """The page of a folder, parsed: well-formed even as XML, it loads nothing and runs only its own script."""
    raychain.report(folder)
    return checked((folder / "report.html").read_text())


def checked(text: str) -> ElementTree.Element:
    root = ElementTree.fromstring(text)
    assert not re.search(r"https?://|//[\w.-]+\.\w+/|@import|url\(", text.replace("s3://", ""))
    loading = {"src", "srcset", "action", "data", "poster", "background"}
    for element in root.iter():
        assert element.tag not in ("iframe", "object", "embed", "img", "form", "base", "a")
        assert not loading & set(element.keys())
        assert not any(name.startswith("on") for name in element.attrib)
        assert element.get("href", "data:,") == "data:,"
    assert len(list(root.iter("script"))) == 1
    for drawing in root.iter("svg"):
        for value in (v for e in drawing.iter() for k, v in e.attrib.items() if k not in ("class", "aria-label")):
            assert "nan" not in value
            assert "inf" not in value
        for shape in [e for e in drawing.iter() if e.tag in ("rect", "circle")]:
            assert all(float(shape.get(key, 0)) >= 0 for key in ("width", "height", "r", "rx")), shape.attrib
    return root


def words(root: ElementTree.Element) -> str:
    return " ".join(" ".join(t for e in root.iter("body") for t in e.itertext()).split())


def drawings(root: ElementTree.Element) -> list[str]:
    return [svg.findtext("title", "") for svg in root.iter("svg") if svg.get("class") == "wide"]


def test_a_finished_run_has_every_part(tmp_path):
    root = made(write(tmp_path / "run", run_json()))
    told = words(root)
    for expected in (
        "tiny",
        "succeeded",
        "30.0 %",
        "Was the chain worth it? Not known.",
        "33.3 % of the MACs of CoM-micro-M alone",
        "was not measured",
        "3.00 T",
        "33.3 % of the 9.00 T alone",
        "×2.1",
        "0.251 M of 6.00 M parameters",
        "CoM-micro-S",
        "failure",
        "a node was lost",
        "2 × H100",
        "unreadable picture",
        "3 of 3,200 samples in 2 shards cannot be used",
        "CoM-micro-S → CoM-micro-M: evaluate 2.0 s, restart after failure 10 s",
    ):
        assert expected in told, expected
    assert drawings(root) == [
        "Training MACs of the chain and of the last model alone",
        "The chain of models",
        "Loss of every stage over training MACs",
        "Accuracy over training MACs",
        "The run over time",
    ]
    assert len([e for e in root.iter("svg") if e.get("class") == "narrow"]) == 5
    assert "zero-shot top-1: 11.0 %" in [e.text for e in root.iter("title")]  # measured in the middle of stage 0


def test_text_stays_inside_of_its_drawing(tmp_path):
    root = made(write(tmp_path / "run", run_json()))
    for svg in root.iter("svg"):
        width = {"wide": WIDE, "narrow": NARROW}[svg.get("class")]
        for text in svg.iter("text"):
            x, length = float(text.get("x")), 0.8 * text_width("".join(text.itertext()))
            left = x - {"middle": length / 2, "end": length}.get(text.get("text-anchor"), 0)
            assert left >= -1, "".join(text.itertext())
            assert left + length <= width + 1, "".join(text.itertext())


NASTY = "<script>alert(1)</script><img src=x onerror=alert(1)>'\"&\x00\x1b]0;x"


@pytest.mark.parametrize("half", ["", "\ud800"])  # half a character, which is no text
def test_names_and_messages_cannot_become_markup(tmp_path, half):
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {f"{k}": poisoned(v) for k, v in value.items()} | {NASTY + half: NASTY + half}
        if isinstance(value, list):
            return [poisoned(v) for v in value]
        kept = ("planned",)  # a kind of trial
        return NASTY + half if isinstance(value, str) and value not in kept else value

    run = poisoned(run_json())
    root = made(write(tmp_path / "run", run, poisoned(LINES), poisoned(TRACE), poisoned(SEARCH)))
    assert half or "alert(1)" in words(root)
    assert not list(root.iter("img"))


def test_credentials_in_addresses_are_left_out(tmp_path):
    folder = write(tmp_path / "run", run_json())
    made(folder)
    assert "hunter2" not in (folder / "report.html").read_text()
    assert plain_text("s3://k:s3cr3t@b/x?secret_key=abc&region=eu") == "s3://…@b/x?secret_key=…&region=eu"
    assert plain_text("tokenizer: simple") == "tokenizer: simple"
    assert escape("<a & 'b'>") == "&lt;a &amp; &#x27;b&#x27;&gt;"


@pytest.mark.parametrize(
    ("run", "lines", "trace", "told"),
    [
        ({}, None, None, "No stage is known yet"),
        (run_json(status="running", stages=[]), [], None, "is at its start of 2 epochs"),
        (run_json(status="running", stages=[], totals={}), LINES[:3], None, "is at step 30 (epoch 0.60) of 2 epochs"),
        (
            run_json(status="failed", stages=run_json()["stages"][:1]),
            LINES[:13],
            TRACE[:4],
            "CoM-micro-M, failed at step 30",
        ),
        (run_json(status="interrupted", restarts=None, config=None), None, TRACE, "all trained"),
        (
            run_json(config={"chain": [{"model": "gone", "epochs": 3}]}, stages=[], totals=None),
            LINES[:10],
            [],
            "samples seen",
        ),
        (
            run_json(environment={}, data_health={"samples": 5, "shards": 1, "bad": {}}),
            None,
            None,
            "All 5 samples in 1 shard can",
        ),
    ],
)
def test_partial_runs_give_a_page(tmp_path, run, lines, trace, told):
    folder = write(tmp_path / "run", run, lines, trace)
    if lines:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"stage": 1, "st')  # killed while writing
    assert told in words(made(folder))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(leaf for key, item in inner for leaf in leaves(item, (*path, key)))]


JUNK = ["x", None, -1, 0, 1e308, 10**400, float("nan"), True, [], {}, [1], [None], {"a": []}]


@pytest.mark.parametrize("part", ["run", "search", "line", "bar"])
def test_no_field_of_any_type_breaks_the_page(tmp_path, part):
    whole = {"run": run_json(), "search": SEARCH, "line": LINES[3], "bar": TRACE[1]}[part]
    every = {"run": 4, "search": 3}.get(part, 1)  # no multiple of the number of junk values: each comes
    for n, path in enumerate(leaves(whole)[1::every]):
        *before, last = path
        changed = copy.deepcopy(whole)
        target: Any = changed
        for key in before:
            target = target[key]
        target[last] = JUNK[n % len(JUNK)]
        match part:
            case "search":
                folder = write(tmp_path / "run", None, None, None, changed)
            case "line":
                folder = write(tmp_path / "run", run_json(), [*LINES[:3], changed])
            case "bar":
                folder = write(tmp_path / "run", run_json(), LINES[:6], [*TRACE[2:], changed])
            case _:
                folder = write(tmp_path / "run", changed, LINES[:6])
        try:
            found = read(Folder(str(folder)))
        except InputError:  # it does not say which search it is, or of a version that is not known yet
            assert path in (("identity",), ("schema",))
            continue
        checked(page(*found))


def test_what_is_damaged_is_left_out_and_named_and_the_rest_is_shown(tmp_path, caplog):
    run = run_json()
    run["stages"][1] |= {"params": "many", "metrics": {"zero_shot_top1": 30.0, "i2t_r1": "x"}, "wall_s": True}
    del run["stages"][0]["key"]
    run["totals"]["speedup"] = [3]
    told = words(made(write(tmp_path / "run", run)))
    assert "30.0 %" in told
    assert "3.00×" not in told
    assert "a node was lost" in told
    assert "'stages.1.wall_s'" in caplog.text
    newer = write(tmp_path / "newer", run | {"schema": 2})
    with pytest.raises(InputError, match="which a newer raychain wrote"):
        raychain.report(newer)


def test_training_that_was_cut_off_is_known_from_its_steps(tmp_path):
    steps = [line(0, n, T0 + n, samples_per_s=64.0) for n in range(1, 20)]
    again = [line(0, n, T0 + 30 + n) for n in range(20, 40)]
    run, _ = read(
        Folder(
            str(
                write(
                    tmp_path / "run",
                    run_json(stages=[]),
                    steps + again,
                    [bar("restart", "failure", 22, 49), bar("stage", "CoM-micro-S", 49, 70)],
                )
            )
        )
    )
    tale = timeline.story(run)
    lost = [(b.start - T0, b.end - T0) for b in tale.bars if b.lost]
    assert lost == [(0.0, 22.0)]
    assert [(g.start - T0, g.end - T0, g.why) for g in tale.gaps] == [
        (22.0, 49.0, "CoM-micro-S: restart after failure 27 s")
    ]


def test_the_axis_is_cut_where_the_run_was_not_at_work(tmp_path):
    later = [bar("stage", "CoM-micro-M", 90_000, 90_050, 1)]
    folder = write(tmp_path / "run", run_json(), [], [TRACE[0], *later])
    tale = timeline.story(read(Folder(str(folder)))[0])
    assert tale.at_work == pytest.approx(100)
    assert tale.away == [(T0 + 50, T0 + 90_000)]
    clock = timeline.Clock(tale, 0, 1000)
    assert (clock(T0), clock(T0 + 90_050)) == pytest.approx((0, 1000))
    assert clock(T0 + 90_000) - clock(T0 + 50) == pytest.approx(timeline.CUT)
    told = words(made(folder))
    assert "The run was not at work once in between" in told
    assert "not at work, 24:59:10" in told


def trial(*chain: tuple[str, float], number: int, macs: float, top: float | None, **more: Any) -> dict[str, Any]:
    metrics = {} if top is None else {"zero_shot_top1": top}
    return {
        "number": number,
        "kind": "planned",
        "params": {},
        "chain": [{"model": f"CoM-micro-{m}", "epochs": e} for m, e in chain],
        "macs": macs,
        "metrics": metrics,
        "status": "failed" if top is None else "succeeded",
    } | more


SEARCH: dict[str, Any] = {
    "schema": 2,
    "identity": "a search",
    "trials": [
        trial(("S", 4), ("L", 1), number=0, macs=2e12, top=25.0, alpha=1.0),
        trial(("S", 4), ("M", 2), ("L", 1), number=1, macs=3e12, top=30.0, alpha=2.0),
        trial(("S", 8), ("L", 1), number=2, macs=4e12, top=28.0),
        trial(("S", 4), ("M", 2), ("L", 2), number=3, macs=5e12, top=32.0),
        trial(("L", 8), number=4, macs=6e12, top=None),
    ],
    "pareto": [],
    "best": None,
    "stage_epochs_requested": 41,
    "stage_epochs_trained": 29,
    "baseline": {"model": "CoM-micro-L", "epochs": 8, "macs": 2e13},
    "comparisons": [
        {
            "model": "CoM-micro-M",
            "at_equal_macs": {
                "trial": 9,
                "epochs": 12.0,
                "macs": 5e12,
                "zero_shot_top1": 45.0,
                "chain_is_ahead_by": -13.0,
            },
            "at_most": None,
        },
    ],
}
SEARCH |= {"pareto": [SEARCH["trials"][number] for number in (0, 1, 3)], "best": SEARCH["trials"][3]}


def test_a_search_has_its_front_its_tree_and_its_trials(tmp_path):
    root = made(write(tmp_path / "search", None, None, None, SEARCH))
    told = words(root)
    for expected in (
        "32.0 %",
        "S 4 → M 2 → L 2",
        "25.0 % of CoM-micro-L alone",
        "No. The best chain reached 32.0 % zero-shot top-1 for 5.00 T MACs; CoM-micro-",
        "29 %",
        "29.0 of 41.0 stage epochs",
        "5 trials, 4 of them measured",
        "equal MACs 12 5.00 T 45.0 13.0 points behind",
    ):
        assert expected in told, expected
    assert drawings(root) == ["zero-shot top-1 of the trials over training MACs", "Stages that trials shared"]
    wide = next(
        s for s in root.iter("svg") if s.get("class") == "wide" and s.findtext("title") == "Stages that trials shared"
    )
    nodes = [e for e in wide.iter("rect") if "node" in e.get("class", "")]
    assert len(nodes) == 8  # S4 with L1 and with M2 (L1, L2), S8 with L1, L8: 13 stages in the trials
    titles = [t.text for t in wide.iter("title")]
    assert "CoM-micro-S, 4 epochs: in 3 trials" in titles
    rows = [["".join(cell.itertext()) for cell in row.iter("td")] for row in root.iter("tr")][3:]
    assert rows[0][0] == "S 4 → M 2 → L 2 best"
    assert [row[0] for row in rows if "Pareto" in row[0]] == ["S 4 → M 2 → L 1 Pareto", "S 4 → L 1 Pareto"]
    assert rows[-1][0] == "L 8"


def test_a_search_says_what_the_large_model_reaches_alone_beside_the_speed_up(tmp_path):
    alone = trial(("L", 16), number=5, macs=2e13, top=36.0)
    whole = {**SEARCH, "trials": [*SEARCH["trials"], alone]}
    told = words(made(write(tmp_path / "search", None, None, None, whole)))
    assert "in MACs, against the last model alone: 36.0 %" in told
    cheap = {**whole, "comparisons": []}
    said = words(made(write(tmp_path / "search", None, None, None, cheap)))
    assert "Cheaper, and not as good. The best chain reached 32.0 %" in said
    assert "CoM-micro-L alone, with 36.0 % for 20.0 T MACs" in said
    whole["trials"][-1] = trial(("L", 16), number=5, macs=2e13, top=31.0)
    said = words(made(write(tmp_path / "search", None, None, None, {**whole, "comparisons": []})))
    assert "Yes. The best chain reached 32.0 % zero-shot top-1 for 5.00 T MACs; 25.0 % of what" in said


def test_a_search_shows_who_chose_and_judged_its_chains_and_where(tmp_path):
    asha = {
        "passed": [
            {"rung": 0, "macs": 2e12, "values": {"a": 10.0, "b": 20.0, "c": 14.0}},
            {"rung": 1, "macs": 6e12, "values": {"b": 30.0}},
        ],
        "behind": {"c": {"macs": 2e12, "value": 14.0, "needed": 16.5, "rivals": 3}},
    }
    stopped = trial(("S", 8), ("L", 2), number=5, macs=5e12, top=None, keys=["c", "d"]) | {"status": "stopped"}
    config = {"search": {"sampler": {"name": "hyperopt", "gamma": 1}, "stop": ["timeout"]}}
    whole = {**SEARCH, "trials": [*SEARCH["trials"], stopped], "asha": asha, "tune": {"ray": "2"}, "config": config}
    root = made(write(tmp_path / "search", None, None, None, whole))
    told = words(root)
    assert "Chosen by: hyperopt; judged by: asha; ended by: timeout." in told
    rows = [["".join(cell.itertext()) for cell in row.iter("td")] for row in root.iter("tr")]
    assert ["0", "2.00 T", "10 %", "3", "20.0", "14.0", "1"] in rows
    assert ["1", "6.00 T", "30 %", "1", "30.0", "30.0", "0"] in rows
    assert ["S 8", "5", "2.00 T", "14.0", "16.5", "2"] in rows


@pytest.mark.parametrize(
    "shown",
    [
        {"pareto": None, "best": None},
        {"pareto": [], "best": trial(number=77, macs=1e12, top=99.0)},
        {"pareto": [SEARCH["trials"][i] for i in (3, 0, 1)], "best": SEARCH["trials"][3]},
        {"pareto": ["x"], "best": "y"},
    ],
)
def test_the_front_and_the_best_are_the_named_ones_or_are_found(tmp_path, shown):
    record = read(Folder(str(write(tmp_path / "search", None, None, None, SEARCH | shown))))[1]
    search = search_json.parse(record)
    assert [t.number for t in search.front] == [0, 1, 3]
    assert search.best == search.trials[3]


def test_stages_of_other_settings_are_not_shared_and_settings_that_differ_are_shown(tmp_path):
    trials = [
        trial(("S", 4), ("L", 1), macs=1e12 * (n + 1), top=20.0 + n, number=10 + n, keys=["s", f"l{n}"],
              reason="behind others", params={"chain": "S", "alpha": 1.0 + n, "width": "centred"})
        for n in range(3)
    ]  # fmt: skip
    others = dict.fromkeys(("pareto", "best", "baseline", "comparisons"))
    search = SEARCH | others | {"name": "my", "status": "running", "trials": trials}
    root = made(write(tmp_path / "search", None, None, None, search))
    titles = [t.text for t in root.iter("title")]
    assert titles.count("CoM-micro-L, 1 epoch: in 1 trial") == 2 * 3  # wide and narrow
    assert titles.count("CoM-micro-S, 4 epochs: in 3 trials") == 2
    assert ["".join(th.itertext()) for th in root.iter("th")] == [
        "chain: model, epochs",
        "trial",
        "MACs",
        "zero-shot top-1 %",
        "alpha",
        "status",
        "reason",
    ]
    assert "my (search) ▶ running" in words(root)
    assert "behind others" in words(root)


def test_a_folder_that_is_no_run_is_one_error_with_status_2(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text('{"name": "x", ')
    for name in ("none", "empty", "broken"):
        with pytest.raises(InputError, match="the folder of a run"):
            raychain.report(tmp_path / name)
    assert not list(tmp_path.rglob("report.html"))
    assert isinstance(CliRunner().invoke(commands, ["report", str(tmp_path / "none")]).exception, InputError)


def test_the_command_prints_where_the_page_is(tmp_path):
    folder = write(tmp_path / "run", run_json())
    done = CliRunner().invoke(commands, ["report", f"{folder}/"])
    assert (done.exit_code, done.stdout) == (0, f"{folder}/report.html\n")


def test_a_run_on_object_storage_gets_its_page_there(bucket):
    folder = Folder(bucket("report/run"))
    folder.write_json("run.json", run_json())
    assert raychain.report(folder.address) == bucket("report/run/report.html")
    checked(folder.read("report.html").decode())


def test_a_page_that_cannot_be_written_is_a_warning_to_a_run(tmp_path, capsys):
    leave_report(Folder(str(tmp_path)))  # there is no run.json
    assert "warning:" in capsys.readouterr().err
    write(tmp_path / "run", run_json())
    leave_report(Folder(str(tmp_path / "run")))
    assert (tmp_path / "run" / "report.html").is_file()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (3.4, 4.4, [3.4, 3.6, 3.8, 4.0, 4.2, 4.4]),
        (0, 7.6e12, [0, 2e12, 4e12, 6e12]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert scales.ticks(low, high, 5) == pytest.approx(expected)


def test_labels_keep_apart_and_names_lose_what_they_share():
    assert spread([10, 12, 50], 15, 0, 100) == [10, 25, 50]
    assert spread([90, 95, 99], 15, 0, 100) == [70, 85, 100]
    assert shortened(["CoM-ViT-T-16", "CoM-ViT-S-16"]) == ["T-16", "S-16"]
    assert shortened(["CoM-micro-S", "CoM-micro-S"]) == ["CoM-micro-S"] * 2
    assert shortened(["ViT", "Swin"]) == ["ViT", "Swin"]


def told(folder: Path) -> str:
    return words(made(folder))


def beside(folder: Path, **changes: Any) -> None:
    """The run of the last model alone beside the run in `folder`."""
    [_, last] = run_json()["stages"]
    stage = last | {"index": 0, "macs": 9 * 10**12, "metrics": {"zero_shot_top1": 32.0}} | changes
    alone = run_json(stages=[stage], totals={"macs": 9e12, "baseline_macs": 9e12, "speedup": 1.0})
    alone["config"]["chain"] = [{"model": stage["model"], "epochs": "2 epochs"}]
    write(folder.with_name(f"{folder.name}-alone"), alone)


@pytest.mark.parametrize(
    ("alone", "answer"),
    [
        ({}, "Cheaper, and not as good. The chain reached 30.0 % zero-shot top-1 for 33.3 % of the MACs"),
        ({"metrics": {"zero_shot_top1": 29.0}}, "Yes. The chain reached 30.0 %"),
        ({"metrics": {"zero_shot_top1": 29.0}, "macs": 2 * 10**12}, "In accuracy, and not in cost."),
        ({"macs": 2 * 10**12}, "No. The chain reached 30.0 %"),
        ({"metrics": {}}, "Not known."),
        ({"model": "CoM-micro-S"}, "Not known."),
    ],
)
def test_the_report_says_first_whether_the_chain_was_worth_it(tmp_path, alone, answer):
    folder = write(tmp_path / "run", run_json())
    beside(folder, **alone)
    said = told(folder)
    assert answer in said
    known = "Not known" not in answer
    assert ("speed-up against" in said) == known, "no speed-up beside an accuracy that nobody measured"
    assert ("measured in run-alone, 2026-01-01" in said) == known


def test_runs_on_other_data_are_not_compared(tmp_path):
    folder = write(tmp_path / "run", run_json())
    beside(folder)
    path = tmp_path / "run-alone/run.json"
    other = json.loads(path.read_text())
    other["config"]["data"]["train"] = [{"shards": ["elsewhere"]}]
    path.write_text(json.dumps(other))
    assert "Not known." in told(folder)


def test_what_is_not_done_or_not_measured_is_said(tmp_path):
    unfinished = write(tmp_path / "a", run_json(status="running", stages=run_json()["stages"][:1]), LINES[:12])
    assert "Not known yet. The chain is not finished. As planned it takes 33.3 %" in told(unfinished)
    bare = run_json()
    for stage in bare["stages"]:
        stage["metrics"] = {}
    assert "Nothing was measured" in told(write(tmp_path / "b", bare))


def test_terms_are_told_where_they_stand(tmp_path):
    root = made(write(tmp_path / "run", run_json()))
    ids = {e.get("id") for e in root.iter()}
    pointed = [e for e in root.iter("button") if e.get("aria-describedby")]
    assert {e.get("aria-describedby") for e in pointed} <= ids
    assert {"term-macs", "term-gap", "term-top-1"} <= {e.get("aria-describedby") for e in pointed}
