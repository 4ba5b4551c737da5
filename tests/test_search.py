"""A real search on Ray: it shares stages, measures what the same chain alone measures, and continues when killed."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

import raychain
from raychain.cli.search import search_command
from raychain.config import load_experiment
from raychain.config.loading import validate
from raychain.errors import InputError, Interrupted
from raychain.records import StageEntry
from raychain.searching import driver
from raychain.searching.campaign import Job, JobEnded, Notice, StageDone, Stop
from raychain.searching.judging import Passed, Rungs
from raychain.searching.tune.scheduler import HalvingScheduler


def searched(experiment: Any) -> dict[str, Any]:
    """search.json of a search in this process."""
    return raychain.search(experiment).record


KEYS = {"trials", "pareto", "best", "stage_epochs_requested", "stage_epochs_trained", "baseline"}
TRIAL_KEYS = {"chain", "macs", "metrics", "status"}


@pytest.fixture
def small(tree: dict[str, Any]) -> dict[str, Any]:
    """Two chains of two tiny models that begin alike, and what they are compared with."""
    space = {"models": "CoM-micro-{S,M}", "first": "10 steps", "grown": ["4 steps", "6 steps"], "alpha": 2}
    search = {"trials": 2, "seeds": 1, "space": space, "controls": {"equal_macs": False}, "sampler": "grid"}
    evaluate = {"zero_shot": tree["evaluate"]["zero_shot"]}
    return {k: v for k, v in tree.items() if k != "chain"} | {
        "family": "CoM-micro-{S,M}",
        "evaluate": evaluate,
        "search": search,
    }


def test_a_search_shares_stages_and_its_best_chain_run_alone_gives_the_same(
    ray_session: None, small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = searched(validate(small))
    out = tmp_path / "runs" / "tiny-search"
    assert result == json.loads((out / "search.json").read_text())
    assert result.keys() >= KEYS
    assert all(trial.keys() >= TRIAL_KEYS and trial["status"] == "succeeded" for trial in result["trials"])
    assert [trial["kind"] for trial in result["trials"]].count("control") == 2
    chains = [trial for trial in result["trials"] if len(trial["chain"]) == 2]
    assert len({trial["keys"][0] for trial in chains}) == 1, "all begin with the same stage"
    assert len({trial["keys"][1] for trial in chains}) == 2
    assert result["stage_epochs_trained"] < 0.8 * result["stage_epochs_requested"]
    trained = [json.loads(path.read_text())["stages"] for path in (out / "chains").glob("*/run.json")]
    keys = [stage["key"] for stages in trained for stage in stages if stage["status"] == "trained"]
    assert sorted(keys) == sorted({key for trial in result["trials"] for key in trial["keys"]}), "each trained once"
    assert "of 2 possible chains" in capsys.readouterr().err

    again = searched(validate(small))
    assert (again["status"], again["trained"]) == ("succeeded", result["trained"])
    assert [trial["metrics"] for trial in again["trials"]] == [trial["metrics"] for trial in result["trials"]]

    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump(small))
    capsys.readouterr()
    search_command(str(file))
    table = capsys.readouterr().out
    row = next(line for line in table.splitlines() if line.startswith("★"))
    assert "CoM-micro-S 0.2667 →" in row, table
    assert "against CoM-micro-M alone: " in table

    best = load_experiment(str(out / "best.yaml"))
    assert [stage.model for stage in best.chain] == ["CoM-micro-S", "CoM-micro-M"]
    alone = raychain.run(best.model_copy(update={"storage": str(tmp_path / "alone")}))
    assert [stage["key"] for stage in alone["stages"]] == result["best"]["keys"]
    assert [stage["status"] for stage in alone["stages"]] == ["trained", "trained"]
    assert alone["stages"][-1]["metrics"] == result["best"]["metrics"]


class Instant:
    """A runner whose stages are there at once; the first one's metric is its steps, every later one adds a point."""

    most: ClassVar[int | None] = None
    """Stages until Ctrl-C."""

    judged: ClassVar[set[str] | None] = None
    """Stages that Tune's scheduler has heard of; a chain's next stage waits for that, so that it may be stopped."""

    def __init__(self, plan: Any, progress: Any, *, verbose: bool) -> None:
        self._notices: queue.SimpleQueue[Notice] = queue.SimpleQueue()
        self._cut: set[int] = set()
        if Instant.judged is not None:
            Instant.judged.clear()

    def start(self, job: Job) -> None:
        threading.Thread(target=self._work, args=(job,), daemon=True).start()

    def _work(self, job: Job) -> None:
        task = job.trial.task
        for place, stage in enumerate(task.stages):
            if stage.key in job.keys:
                before = task.stages[place - 1].key if place else None
                until = time.monotonic() + 30
                while before and Instant.judged is not None and time.monotonic() < until:
                    time.sleep(0.3)  # and for the cut
                    if before in Instant.judged:
                        break
                if id(job) in self._cut:
                    self.put(JobEnded(job, stopped=True))
                    return
                metrics = {"zero_shot_top1": task.stages[0].steps ** 0.5 + place}
                digest = task.suite.digest
                record = StageEntry(key=stage.key, status="trained", metrics=metrics, evaluation=digest)
                self.put(StageDone(job, stage.key, record))
        self.put(JobEnded(job))

    def wait(self) -> Notice:
        notice = self._notices.get()
        if Instant.most is not None and isinstance(notice, StageDone):
            Instant.most -= 1
            if Instant.most < 0:
                os.kill(os.getpid(), signal.SIGINT)
                job = notice.job
                self._cut.add(id(job))
                ended = False
                while not isinstance(notice, Stop):
                    notice = self._notices.get()
                    ended = ended or isinstance(notice, JobEnded)
                if ended:
                    self.put(JobEnded(job, stopped=True))
        return notice

    def put(self, notice: Notice) -> None:
        self._notices.put(notice)

    def cut(self, job: Job) -> None:
        self._cut.add(id(job))

    def stop(self) -> None: ...


@pytest.fixture
def instant(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> type[Instant]:
    """Nothing is trained."""
    monkeypatch.setattr(driver, "RayRunner", Instant)
    monkeypatch.setattr(driver, "slots", lambda _: 1)
    monkeypatch.setattr(Instant, "most", None)
    return Instant


@pytest.fixture
def halved(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Chains that begin with 4, 8 or 12 steps of the first model, judged after the MACs of 4 of them."""
    alone = {k: v for k, v in small.items() if k not in ("family", "search")}
    grace = raychain.plan(validate(alone | {"chain": [{"model": "CoM-micro-S", "epochs": "4 steps"}]}))["macs"]
    space = {"models": "CoM-micro-{S,M}", "first": [f"{n} steps" for n in (4, 8, 12)], "grown": ["6 steps", "7 steps"]}
    asha = {"grace": grace, "reduction_factor": 2}
    hears, judged = HalvingScheduler.on_trial_result, set()

    def hear(self: HalvingScheduler, controller: Any, trial: Any, result: Any) -> str:
        decision = hears(self, controller, trial, result)
        judged.add(result["key"])
        return decision

    monkeypatch.setattr(HalvingScheduler, "on_trial_result", hear)
    monkeypatch.setattr(Instant, "judged", judged)
    more = {"trials": 6, "seeds": 0, "space": space, "asha": asha, "controls": None, "sampler": "grid"}
    return small | {"search": more}


@pytest.mark.long
def test_a_search_of_schema_1_goes_on_if_its_settings_and_data_are_the_same(
    halved: dict[str, Any], instant: type[Instant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, start = {}, Instant.start

    def noting(self: Instant, job: Job) -> None:
        names.update({stage.key: stage.former.key for stage in job.trial.task.stages})
        start(self, job)

    monkeypatch.setattr(Instant, "start", noting)
    instant.most = 3
    with pytest.raises(Interrupted):
        searched(validate(halved))
    instant.most = None
    file = tmp_path / "runs" / "tiny-search" / "search.json"
    text = file.read_text()
    for key, former in names.items():
        text = text.replace(key, former)
    former = json.loads(text) | {"schema": 1, "identity": "of schema 1"}
    assert former["asha"]["behind"].keys() <= set(names.values())
    for changed in (halved | {"train": halved["train"] | {"lr": 0.5}}, halved):
        file.write_text(json.dumps(former))
        if changed is halved:
            os.utime(file, (1, 1))
        with pytest.raises(InputError, match="other settings or other data"):
            searched(validate(changed))
    file.write_text(json.dumps(former))
    result = searched(validate(halved))
    whole = searched(validate(halved | {"storage": str(tmp_path / "whole")}))
    assert (result["asha"], result["identity"], result["trained"]) == (
        whole["asha"], whole["identity"], whole["trained"],
    )  # fmt: skip


def test_chains_that_are_behind_at_equal_macs_are_stopped_and_a_search_goes_on_with_that(
    halved: dict[str, Any], instant: type[Instant], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 after 4 steps stay; 2.8 after 8 and 3.5 after 12 are 1.4 and 1.2 after 4."""
    instant.most = 3
    with pytest.raises(Interrupted):
        searched(validate(halved))
    instant.most = None
    result = searched(validate(halved))
    whole = searched(validate(halved | {"storage": str(tmp_path / "whole")}))
    assert result["asha"] == whole["asha"]
    seen = [
        (trial["params"]["first"], trial["params"]["grown.CoM-micro-M"], trial["status"]) for trial in whole["trials"]
    ]
    assert seen == [
        ("4 steps", "6 steps", "succeeded"),
        ("4 steps", "7 steps", "succeeded"),
        ("8 steps", "6 steps", "stopped"),
        ("12 steps", "6 steps", "stopped"),
    ], "what begins like a stopped chain is not begun"
    assert [(t["params"], t["status"]) for t in result["trials"]] == [
        (t["params"], t["status"]) for t in whole["trials"]
    ]
    assert len(whole["trained"]) == 5, "of the stopped chains one stage each"
    assert whole["stage_epochs_requested"] == pytest.approx(
        whole["stage_epochs_trained"] + whole["trials"][0]["chain"][0]["epochs"], abs=1e-3
    )
    (rung,) = whole["asha"]["passed"][:1]
    assert sorted(rung["values"].values()) == pytest.approx([12**0.5 / 3, 8**0.5 / 2, 2])
    assert "stopped: behind at" in capsys.readouterr().err


def test_tpe_hears_of_chains_that_were_stopped(halved: dict[str, Any], instant: type[Instant]) -> None:
    halved["search"] |= {"sampler": "tpe"}
    result = searched(validate(halved))
    assert {trial["status"] for trial in result["trials"]} == {"succeeded", "stopped"}
    assert result["best"]["status"] == "succeeded"
    assert searched(validate(halved))["trials"] == result["trials"], "nothing is left to try"


def test_asha_that_cannot_be_is_one_message(small: dict[str, Any], instant: type[Instant]) -> None:
    with pytest.raises(InputError, match=r"(?s)search.asha.grace.*200 %.*fewer than the baseline's"):
        searched(validate(small | {"search": small["search"] | {"asha": {"grace": "200 %"}}}))
    with pytest.raises(InputError, match="aim: metric"):
        validate(small | {"search": small["search"] | {"asha": {}, "aim": "pareto"}})


@pytest.mark.long
def test_a_chain_is_stopped_in_the_middle_of_a_stage(
    ray_session: None, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second of two chains is behind at a rung within its last stage."""
    monkeypatch.setattr(Rungs, "between", lambda self, before, now: [Passed(9, now.percent, -now.percent)])
    space = small["search"]["space"] | {"grown": ["6 steps", "5000 steps"]}
    small["evaluate"]["every"] = "4 steps"
    small["search"] |= {"space": space, "asha": {"grace": 1.0}, "controls": None, "concurrent": 1, "seeds": 0}
    result = searched(validate(small))
    assert [trial["status"] for trial in result["trials"]] == ["succeeded", "stopped"]
    assert len(result["trained"]) == 2, "the first stage of both, and the first one's last"
    folder = tmp_path / "runs/tiny-search/chains" / result["trials"][1]["keys"][-1][:12]
    cut = json.loads((folder / "run.json").read_text())
    assert cut["status"] == "interrupted"
    assert cut["stages"][0]["status"] == "reused"


@pytest.mark.long
def test_a_killed_search_continues_where_it_was(small: dict[str, Any], tmp_path: Path) -> None:
    small["search"] = small["search"] | {"controls": None, "concurrent": 1}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(small))
    out = tmp_path / "search"
    command = [sys.executable, "-m", "raychain.search", str(file), "--out", str(out), "--json"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    store, until = tmp_path / "runs" / "store", time.monotonic() + 200
    while not list(store.glob("*/stage.json")) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in store.glob("*/stage.json")}
    assert finished
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "search: continued" in done.stderr
    result = json.loads(done.stdout)
    assert {trial["status"] for trial in result["trials"]} == {"succeeded"}
    # One first stage and two second ones; one that was finished in the moment of the kill may not have been noted.
    assert len(result["trained"]) in (2, 3)
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())


@pytest.mark.long
def test_a_search_goes_on_whatever_its_record_holds(
    halved: dict[str, Any], instant: type[Instant], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    instant.most = 3
    with pytest.raises(Interrupted):
        searched(validate(halved))
    instant.most = None
    file = tmp_path / "runs" / "tiny-search" / "search.json"
    good = json.loads(file.read_text())
    trial = good["trials"][0]
    twice = [trial, trial]
    wrong = [{**trial, "params": {"chain": "nothing"}}, *({**trial, "params": odd} for odd in ({}, {"length": "x"}))]
    for odd in (
        {"identity": 5}, {"trials": 5}, {"trials": [5]}, {"trials": twice}, {"trials": wrong}, {"begun": {"x": [1]}},
        {"trained": {"a": 1}}, {"asha": {"passed": [1], "behind": {}}}, {"asha": 7}, {"asha": None, "trials": None},
    ):  # fmt: skip
        file.write_text(json.dumps(good | odd))
        caplog.clear()
        assert searched(validate(halved))["status"] == "succeeded", odd
        raychain.report(file.parent)
    for content in (b"[" * 3000, b"[]", b"\xff", b""):
        file.write_bytes(content)
        assert searched(validate(halved))["status"] == "succeeded", content
    assert len(list(file.parent.glob("search.json.damaged-*"))) == 5
