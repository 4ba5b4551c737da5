"""Ray Tune's own parts in a search, named in an experiment: searchers, schedulers, stoppers, callbacks, results."""

# ruff: noqa: F811 - fixtures of another module
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import FIFOScheduler, MedianStoppingRule
from test_search import Instant, halved, instant, searched, small  # noqa: F401 - fixtures

import raychain
from raychain.config.loading import validate
from raychain.errors import InputError, Interrupted
from raychain.searching.tune.scheduler import NOBODY, ChainScheduler

PACKAGE = Path(__file__).parent / "packages" / "tuning"
METRIC = "zero_shot_top1"


@pytest.fixture
def six(halved: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Six chains that begin with 4, 8 or 12 steps, none stopped; better the longer their first stage is."""
    monkeypatch.syspath_prepend(str(PACKAGE))
    monkeypatch.setattr(Instant, "judged", None)  # nobody judges, so no stage waits for it
    halved["search"] |= {"asha": None, "trials": 4}
    return halved


def with_parts(tree: dict[str, Any], **parts: Any) -> Any:
    return validate(tree | {"search": tree["search"] | parts})


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "hyperopt", "n_initial_points": 2},
        pytest.param("QMCSampler", marks=pytest.mark.long),
        pytest.param({"name": "tpe", "n_startup_trials": 2}, marks=pytest.mark.long),
        {"name": "raychain_tuning.Climb", "start": 1},
    ],
    ids=lambda sampler: str(sampler),
)
def test_any_searcher_gives_chains_that_are_new(
    six: dict[str, Any],
    instant: type[Instant],
    sampler: Any,
) -> None:
    found = raychain.search(with_parts(six, sampler=sampler))
    trials = found.record["trials"]
    assert [trial["status"] for trial in trials] == ["succeeded"] * 4
    assert len({trial["keys"][-1] for trial in trials}) == 4
    assert len(found.results) == 4
    assert found.results.get_best_result(METRIC, "max").metrics[METRIC] == found.best["metrics"][METRIC]
    assert found.front == found.record["pareto"]
    again = raychain.search(with_parts(six, sampler=sampler, trials=6))
    assert again.record["trials"][:4] == trials, "more trials than before"
    assert len(again.record["trials"]) == 6


@pytest.mark.parametrize("scheduler", [
    pytest.param({"name": "median", "grace_period": 0.1, "min_samples_required": 1}, marks=pytest.mark.long),
    {"name": "raychain_tuning.Floor", "metric": METRIC, "least": 2.5},
    {"name": "hyperband", "max_t": 100},
], ids=["median", "own", "hyperband"])  # fmt: skip
def test_any_scheduler_stops_chains(
    six: dict[str, Any],
    instant: type[Instant],
    scheduler: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A grid: the chains of 4 steps come first, and have 2 after their first stage."""
    from raychain.searching.tune.scheduler import ChainScheduler

    hears, judged = ChainScheduler.on_trial_result, set[str]()

    def hear(self: ChainScheduler, controller: Any, trial: Any, result: Any) -> str:
        decision = hears(self, controller, trial, result)
        judged.add(result["key"])
        return decision

    monkeypatch.setattr(ChainScheduler, "on_trial_result", hear)
    monkeypatch.setattr(Instant, "judged", judged)
    result = searched(with_parts(six, scheduler=scheduler))
    ends = [(trial["params"]["first"], trial["status"]) for trial in result["trials"]]
    if "least" in scheduler:
        assert ends == [
            ("4 steps", "stopped"),
            ("4 steps", "stopped"),
            ("8 steps", "succeeded"),
            ("8 steps", "succeeded"),
        ]
        assert result["trials"][0]["reason"] == "stopped by Floor"
    else:
        assert {status for _, status in ends} <= {"succeeded", "stopped"}
        assert result["best"]["status"] == "succeeded"


def test_stoppers_end_a_search_and_callbacks_hear_of_it(
    six: dict[str, Any],
    instant: type[Instant],
    tmp_path: Path,
) -> None:
    diary = {"name": "raychain_tuning.Diary", "file": str(tmp_path / "diary")}
    stop = [{"name": "raychain_tuning.Enough", "metric": METRIC, "most": 3.5}, {"name": "timeout", "timeout": 600}]
    result = searched(with_parts(six, stop=stop, callbacks=diary, controls={"equal_macs": True}))
    chosen = [trial for trial in result["trials"] if trial["kind"] == "sampled"]
    assert 1 <= len(chosen) < 4
    assert result["best"]["metrics"][METRIC] >= 3.5
    heard = [line.split() for line in (tmp_path / "diary").read_text().splitlines()]
    assert {int(number) for number, *_ in heard} >= {trial["number"] for trial in result["trials"][:2]}
    more = searched(with_parts(six, stop=[], callbacks=[], controls={"equal_macs": True}))
    assert len([trial for trial in more["trials"] if trial["kind"] == "sampled"]) == 4, "what stopped it is gone"


def test_tunes_own_tools_read_the_folder(six: dict[str, Any], instant: type[Instant], tmp_path: Path) -> None:
    from ray import tune

    result = searched(with_parts(six, controls={"equal_macs": False}))
    folder = tmp_path / "runs/tiny-search/tune"
    analysis = tune.ExperimentAnalysis(str(folder), default_metric=METRIC, default_mode="max")
    assert len(analysis.trials) == len(result["trials"])
    assert {"macs", "percent", "reused", "config/kind"} <= set(analysis.dataframe().columns)

    def chain(config: dict[str, Any]) -> None: ...

    grid = tune.Tuner.restore(str(folder), chain).get_results()
    best = grid.get_best_result(METRIC, "max")
    key = result["trials"][best.config["number"]]["keys"][-1]
    with best.checkpoint.as_directory() as checkpoint:
        assert json.loads((Path(checkpoint) / "stage.json").read_text())["key"] == key
    assert len(list(folder.glob("*/events.out.tfevents.*"))) == len(result["trials"])


@pytest.mark.parametrize(
    ("parts", "where", "says"),
    [
        ({"sampler": "hyperopd"}, "search.sampler", "did you mean hyperopt"),
        ({"sampler": {"name": "grid", "x": 1}}, "search.sampler", "no options"),
        ({"sampler": "raychain_tuning.Floor"}, "search.sampler", "a class of"),
        ({"sampler": "raychain_tuning.Nothing"}, "search.sampler", "correct the name"),
        ({"sampler": {"name": "hyperopt", "n": 1}}, "search.sampler", "unexpected keyword"),
        ({"sampler": "GPSampleR"}, "search.sampler", "GPSampler"),
        ({"sampler": "hyperopt", "aim": "pareto"}, "search.sampler", "aim: pareto"),
        ({"scheduler": "pbt"}, "search.scheduler", "copies weights"),
        ({"scheduler": "ray.tune.schedulers.PopulationBasedTraining"}, "search.scheduler", "copies weights"),
        ({"scheduler": "medians"}, "search.scheduler", "did you mean median"),
        ({"stop": "timeout"}, "search.stop", "missing"),
        ({"callbacks": "raychain_tuning.Floor"}, "search.callbacks", "a class of"),
        ({"callbacks": "wandbb"}, "search.callbacks", "did you mean wandb"),
        ({"callbacks": "aim"}, "search.callbacks", "install what it needs"),
        ({"callbacks": {"name": "wandb", "project": "x", "api_key": "hunter2"}}, "search.callbacks.api_key", "WANDB"),
    ],
)
def test_parts_that_cannot_be_are_one_message(
    six: dict[str, Any],
    instant: type[Instant],
    parts: dict[str, Any],
    where: str,
    says: str,
) -> None:
    with pytest.raises(InputError) as error:
        searched(with_parts(six, **parts))
    assert where in str(error.value)
    assert says in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("address", ["s3://key:hunter2@bucket/x", "s3://bucket/x?secret_key=hunter2"])
def test_a_folder_whose_address_holds_a_key_is_refused(six: dict[str, Any], address: str) -> None:
    """Tune pickles how its folder is reached."""
    for call, where in ((lambda: raychain.search(validate(six), out=address), "--out"),
                        (lambda: raychain.search(validate(six | {"storage": address})), "storage")):  # fmt: skip
        with pytest.raises(InputError, match="an address without keys") as error:
            call()
        assert str(error.value).startswith(where)
        assert "hunter2" not in str(error.value)


class Chain:
    """What schedulers look at of a trial of Tune's."""

    def __init__(self, name: str) -> None:
        self.trial_id, self.config = name, {"kind": "sampled", "number": int(name)}


def said(key: str, percent: float, value: float, *, complete: bool = False) -> dict[str, Any]:
    return {"key": key, "step": 4, "percent": percent, METRIC: value, "whole": True, "complete": complete}


def test_a_scheduler_hears_no_more_of_a_chain_that_goes_on_against_its_verdict() -> None:
    """Tune's median rule raises AssertionError of a trial that it has stopped."""
    rule = {"time_attr": "percent", "metric": METRIC, "mode": "max", "grace_period": 1, "min_samples_required": 1}
    anyone: Any = SimpleNamespace(get_live_trials=list)
    scheduler = ChainScheduler(MedianStoppingRule(**rule), METRIC)
    first, second = Chain("0"), Chain("1")
    for chain in (first, second):
        scheduler.on_trial_add(anyone, chain)  # type: ignore[arg-type]
    heard = [
        (first, said("s", 10, 50)),
        (first, said("t", 20, 60)),
        (second, said("s", 10, 5)),
        (second, said("u", 20, 6)),
    ]
    answers = [scheduler.on_trial_result(anyone, chain, report) for chain, report in heard]  # type: ignore[arg-type]
    assert answers == ["CONTINUE"] * 4, "the stage s has one verdict, for all"
    again = ChainScheduler(MedianStoppingRule(**rule), METRIC)
    again.restore_state(scheduler.state())
    for chain in (first, second):
        again.on_trial_add(anyone, chain)  # type: ignore[arg-type]


def test_a_scheduler_of_a_search_that_goes_on_is_told_whole_reports() -> None:
    told: list[Any] = []

    class Listening(FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            told.append(result)
            return "CONTINUE"

    chain, report = Chain("0"), said("s", 10, 50) | {"trial_id": "0", "config": {"kind": "sampled", "number": 0}}
    before, again = ChainScheduler(Listening(), METRIC), ChainScheduler(Listening(), METRIC)
    before.on_trial_result(NOBODY, chain, report)  # type: ignore[arg-type]
    again.restore_state(before.state())
    again.on_trial_add(NOBODY, chain)  # type: ignore[arg-type]
    assert told == [report, report]


def test_asha_by_its_name_is_asha(six: dict[str, Any]) -> None:
    named = with_parts(six, scheduler={"name": "asha", "reduction_factor": 4})
    assert named.search.asha.reduction_factor == 4
    assert named.search.scheduler is None
    assert with_parts(six, scheduler="asha").search.asha == with_parts(six, asha={}).search.asha
    with pytest.raises(InputError, match="either"):
        with_parts(six, scheduler="median", asha={})


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        "callbacks",
        *(pytest.param(d, marks=pytest.mark.long) for d in ("emptied", "gone", "pickle", "versions")),
    ],
)
def test_a_damaged_folder_is_put_aside_and_the_search_goes_on_from_its_record(
    six: dict[str, Any], instant: type[Instant], tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "runs/tiny-search"
    instant.most = 3
    with pytest.raises(Interrupted):
        searched(validate(six))
    instant.most = None
    record = json.loads((out / "search.json").read_text())
    (state,) = (out / "tune").glob("experiment_state-*.json")
    match damage:
        case "truncated":
            state.write_bytes(state.read_bytes()[:-200])
        case "callbacks":  # read when the searcher has its state again
            (state,) = (out / "tune").glob("callback-states-*.pkl")
            state.write_bytes(state.read_bytes()[:-20])
        case "emptied":
            state.write_bytes(b"")
        case "gone":
            state.unlink()
        case "pickle":
            (out / "tune/tuner.pkl").write_bytes(b"no pickle")
        case "versions":
            (out / "search.json").write_text(json.dumps(record | {"tune": {"ray": "1.0"}}))
    found = raychain.search(validate(six))
    trials = found.record["trials"]
    assert [trial["status"] for trial in trials] == ["succeeded"] * 4
    before = [(t["number"], t["params"]) for t in record["trials"]]
    assert [(t["number"], t["params"]) for t in trials][: len(before)] == before
    assert (out / "tune.before-1").is_dir()
    assert len(found.results) == 4
    assert damage == "versions" or "search.json is taken instead" in caplog.text


def test_what_an_earlier_call_knew_stays_written_where_the_next_one_ends_at_once(
    six: dict[str, Any], instant: type[Instant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs/tiny-search"
    instant.most = 3
    with pytest.raises(Interrupted):
        searched(validate(six))
    record = (out / "search.json").read_text()

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("raychain.searching.tune.tuner.fit", fail)
    with pytest.raises(MemoryError):
        raychain.search(validate(six))
    assert (out / "search.json").read_text() == record
    assert json.loads(record)["trials"]


def test_so_many_trials_wait_at_most_as_memory_has_room_for() -> None:
    from raychain.searching.tune.tuner import most_open

    assert [most_open(groups) for groups in (1, 2, 11, 16, 22, 64)] == [9, 10, 19, 24, 24, 66]
