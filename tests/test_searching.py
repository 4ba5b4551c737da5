"""The search without Ray: the tree of stages and its schedule, the space and its limits, samplers, what is found."""

from __future__ import annotations

import heapq
import itertools
import json
import random
import sys
import time
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raychain.cli.program import main
from raychain.cli.search import search_command
from raychain.config.loading import validate
from raychain.errors import InputError
from raychain.evaluators.metrics import Definition
from raychain.records import HalvingRecord, StageEntry
from raychain.searching.campaign import (
    Campaign,
    Job,
    JobEnded,
    Measured,
    Notice,
    StageDone,
    Stop,
    Unwanted,
    Wanted,
    ratio,
)
from raychain.searching.choices import Choices
from raychain.searching.experiments import proxied
from raychain.searching.judging import Passed, Point, Rungs, Verdict
from raychain.searching.outcome import best_chain, comparisons, pareto, rank_correlation
from raychain.searching.reports import DONE, Measure, Reporter
from raychain.searching.space import make_space
from raychain.searching.tree import StageTree
from raychain.searching.trials import Trial
from raychain.searching.tune.searchers import make_searcher

TOP1, LOSS = Definition("set/top1", "top-1", "%", "high"), Definition("set/loss", "loss", "nats", "low")
MICRO: dict[str, Any] = {
    "name": "micro",
    "data": {"train": "nowhere/{0..3}.tar", "samples": 16_000},
    "chain": [{"model": "CoM-micro-S", "epochs": 8}, {"model": "CoM-micro-M", "epochs": 3}],
    "train": {"global_batch": 128, "warmup": "10 %"},
    "evaluate": {"zero_shot": "nowhere"},
}
SPACE: dict[str, Any] = {"models": "CoM-micro-{S,M,L}", "first": [4, 8], "grown": {"low": 1, "high": 3, "step": 1}}


@dataclass
class Stage:
    """As much of a StageTask as a campaign looks at."""

    key: str
    model: str
    epochs: float
    macs: float
    steps: int = 100
    trunk: str = ""
    rungs: tuple[int, ...] = ()


@dataclass
class Chain:
    stages: tuple[Stage, ...]

    def measured(self, record: StageEntry) -> bool:
        return True


def trial(number: int, stages: list[tuple[str, float]]) -> Trial:
    """A chain of (model, epochs) whose keys stand for all that comes before, as real ones do."""
    keys = list(itertools.accumulate(f"{model}{epochs:g}/" for model, epochs in stages))
    made = [Stage(key, model, epochs, epochs * 3 ** ord(model[0]) / 3 ** ord("a"))
            for key, (model, epochs) in zip(keys, stages, strict=True)]  # fmt: skip
    return Trial(number, "sampled", {"number": number}, Chain(tuple(made)))  # type: ignore[arg-type]


@dataclass
class Simulated:
    """Trains stages in no time of ours, on a clock of its own, with `measures` measurements within each."""

    fails: frozenset[str] = frozenset()
    stops_after: int | None = None
    measures: int = 0
    metric: Any = lambda key, share: 1.0
    clock: float = 0.0
    busy: float = 0.0
    trained: list[str] = field(default_factory=list)
    events: list[tuple[float, int, Notice]] = field(default_factory=list)
    order: Any = field(default_factory=itertools.count)

    def start(self, job: Job) -> None:
        at = self.clock
        for step in job.trial.path:
            key, cost = step.key, step.share * step.stage.macs
            if key not in job.keys:
                continue
            for n in range(1, self.measures + 1):
                share = n / (self.measures + 1)
                found = Measure(int(share * step.stage.steps), {"set/top1": self.metric(key, share)})
                self.push(at + share * cost, Measured(job, step.place, found))
            at += cost
            if key in self.fails:
                self.push(at, JobEnded(job, f"{key} is not finite"))
                return
            if self.stops_after is not None and len(self.trained) >= self.stops_after:
                self.push(at, JobEnded(job, stopped=True))
                return
            self.trained.append(key)
            self.busy += cost
            metrics = {"set/top1": self.metric(key, 1.0)}
            self.push(at, StageDone(job, key, StageEntry(key=key, status="trained", metrics=metrics)))
        self.push(at, JobEnded(job))

    def wait(self) -> Notice:
        self.clock, _, notice = heapq.heappop(self.events)
        return notice

    def put(self, notice: Notice) -> None:
        self.push(self.clock, notice)

    def cut(self, job: Job) -> None:
        """What it would have trained from now on it has not."""
        left = [found for found in self.events if getattr(found[2], "job", None) is job]
        self.events = [found for found in self.events if getattr(found[2], "job", None) is not job]
        heapq.heapify(self.events)
        for _, _, notice in left:
            if isinstance(notice, StageDone):
                self.trained.remove(notice.key)
                self.busy -= next(s.share * s.stage.macs for s in job.trial.path if s.key == notice.key)
        self.push(self.clock, JobEnded(job, stopped=True))

    def push(self, at: float, notice: Notice) -> None:
        heapq.heappush(self.events, (at, next(self.order), notice))


@dataclass
class Tune:
    """What Tune does with a campaign: begins trials when it is hungry, hears of reports a little later, ends trials."""

    runner: Simulated
    source: Any
    """The trials that are begun one after the other; those in `at_once` are wanted from the beginning."""
    at_once: list[Trial] = field(default_factory=list)
    stops: Any = lambda trial, report: False
    delay: float = 0.0
    campaign: Any = None
    reports: dict[int, list[Any]] = field(default_factory=dict)
    open: set[int] = field(default_factory=set)
    sent: int = 0
    idle: float = 0.0

    def run(self, slots: int, known: dict[str, StageEntry] | None = None, begun: Any = None) -> Campaign:
        self.campaign = Campaign(self.runner, slots, known=lambda step: (known or {}).get(step.key),
                                 reporter=Reporter(TOP1, 100.0), audience=self, begun=begun)  # fmt: skip
        if self.at_once:
            self.want(self.at_once)
        self.campaign.run()
        return self.campaign

    def want(self, trials: list[Trial]) -> None:
        self.open |= {trial.number for trial in trials}
        self.sent += 1
        self.runner.put(Wanted(trials))

    def tell(self, trial: Trial, first: int, reports: Any, end: str | None) -> None:
        known = self.reports.setdefault(trial.number, [])
        assert first == len(known), "in order, none twice"
        known += reports
        macs = [report["macs"] for report in known]
        assert macs == sorted(macs)
        if trial.number not in self.open:
            return
        if end:
            trial.status = "succeeded" if end == DONE else "failed"
            trial.reason = None if end == DONE else end
        elif any(self.stops(trial, report) for report in reports):
            trial.status = "stopped"
        if trial.status != "running":
            self.open.remove(trial.number)
            self.runner.push(self.runner.clock + self.delay, Unwanted(trial))

    def hungry(self, yes: bool, heard: int) -> None:
        if heard != self.sent or self.campaign.stopping:
            return
        if yes and (fresh := next(self.source, None)) is not None:
            self.want([fresh])
        elif not self.open and not self.campaign.running:
            self.runner.put(Stop())


def search(runner: Simulated, trials: list[Trial], slots: int, known: Any = None, *, at_once: bool = True) -> Campaign:
    """A campaign of all trials until they are over."""
    tune = Tune(runner, iter([] if at_once else trials), trials if at_once else [])
    return tune.run(slots, known)


def with_trunk(number: int, stages: list[tuple[str, float]]) -> Trial:
    """As `trial`, of stages of 100 steps an epoch whose last 20 % are a cool-down; lengths are 1 or 2 epochs."""
    made = trial(number, stages)
    for stage in made.task.stages:
        stage.steps, stage.rungs = int(100 * stage.epochs), (80,) if stage.epochs == 1 else (80, 160)  # type: ignore
        stage.trunk = stage.key.rsplit(f"{stage.epochs:g}/", 1)[0]  # type: ignore[misc]
    return made


def interrupted(runner: Simulated, trials: list[Trial], slots: int) -> Campaign:
    """A campaign of all trials that a signal ends when `runner.stops_after` stages are trained, if it has more."""
    tune = Tune(runner, iter(()), trials)
    end = tune.hungry

    def hungry(yes: bool, heard: int) -> None:
        if len(runner.trained) >= (runner.stops_after or 0) and not tune.campaign.stopping:
            runner.put(Stop())
        else:
            end(yes, heard)

    tune.hungry = hungry  # type: ignore[method-assign]
    return tune.run(slots)


CHAINS = st.lists(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([1.0, 2.0])), min_size=1, max_size=4),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(CHAINS, st.integers(1, 5), st.booleans())
def test_every_trial_ends_and_no_stage_is_trained_twice(chains: Any, slots: int, at_once: bool) -> None:
    runner = Simulated()
    trials = [trial(number, chain) for number, chain in enumerate(chains)]
    work = search(runner, trials, slots, at_once=at_once)
    assert {one.status for one in trials} == {"succeeded"}
    needed = {key for one in trials for key in one.keys}
    assert sorted(runner.trained) == sorted(needed)
    assert work.trained == needed
    requested, trained = ratio(trials, set(runner.trained))
    assert trained <= requested


@settings(max_examples=100, deadline=None)
@given(CHAINS, st.integers(1, 4), st.integers(0, 10))
def test_a_search_that_was_stopped_goes_on_and_trains_the_rest(chains: Any, slots: int, after: int) -> None:
    runner = Simulated(stops_after=after)
    first = interrupted(runner, [trial(number, chain) for number, chain in enumerate(chains)], slots)
    again, trials = Simulated(), [trial(number, chain) for number, chain in enumerate(chains)]
    known = {key: StageEntry(key=key, status="trained", metrics={"set/top1": 1.0}) for key in runner.trained}
    begun = {job.trial.number: job.keys for job in first.cut}
    second = Tune(again, iter(()), trials).run(slots, known, begun)
    assert not set(again.trained) & set(runner.trained)
    assert {one.status for one in trials} == {"succeeded"}
    cut = {key for keys in begun.values() for key in keys}
    assert second.trained == set(again.trained) | (cut & set(runner.trained))


def test_what_was_under_way_is_trained_first_by_one_worker_group_as_it_was() -> None:
    runner, started = Simulated(), []
    start = runner.start
    runner.start = lambda job: (started.append((job.trial.number, job.keys)), start(job))  # type: ignore[assignment]
    trials = [trial(0, [("a", 1), ("b", 9)]), trial(1, [("a", 1), ("c", 1)])]
    Tune(runner, iter(()), trials).run(1, {}, {1: ["a1/", "a1/c1/"]})
    assert started == [(1, ["a1/", "a1/c1/"]), (0, ["a1/b9/"])]


@settings(max_examples=100, deadline=None)
@given(CHAINS, st.integers(1, 4), st.integers(0, 12))
def test_stages_that_differ_in_length_share_their_trunk(chains: Any, slots: int, after: int) -> None:
    runner = Simulated(stops_after=after)
    trials = [with_trunk(number, chain) for number, chain in enumerate(chains)]
    nodes = {step.key: step.share * step.stage.epochs for one in trials for step in one.path}
    interrupted(runner, trials, slots)
    again, trials = Simulated(), [with_trunk(number, chain) for number, chain in enumerate(chains)]
    known = {key: StageEntry(key=key, status="trained", metrics={"set/top1": 1.0}) for key in runner.trained}
    search(again, trials, slots, known)
    assert {one.status for one in trials} == {"succeeded"}
    assert sorted(again.trained + runner.trained) == sorted(nodes), "every part once, an interruption or not"
    requested, trained = ratio(trials, set(nodes))
    assert trained == pytest.approx(sum(nodes.values()))
    assert requested == pytest.approx(sum(epochs for chain in chains for _, epochs in chain))


@settings(max_examples=200, deadline=None)
@given(CHAINS, st.integers(1, 8), st.integers(0, 1000), st.sampled_from([0.0, 0.5, 20.0]), st.booleans(), st.booleans())
def test_with_failures_stops_and_slow_stages_every_trial_ends_and_no_slot_idles(
    chains: Any, slots: int, seed: int, delay: float, at_once: bool, trunks: bool
) -> None:
    """A stage that is slow costs up to 16 times as much. Tune hears late; it stops trials after any report."""
    chance = random.Random(seed)
    trials = [(with_trunk if trunks else trial)(number, chain) for number, chain in enumerate(chains)]
    cost = {step.stage.key: chance.choice([1, 1, 4, 16]) for one in trials for step in one.path}
    for one in trials:
        for stage in one.task.stages:
            stage.macs *= cost[stage.key]
    keys = sorted({step.key for one in trials for step in one.path})
    runner = Simulated(fails=frozenset(key for key in keys if chance.random() < 0.1), measures=chance.choice([0, 2]))
    tune = Tune(runner, iter([] if at_once else trials), trials if at_once else [], delay=delay,
                stops=lambda trial, report: chance.random() < 0.15)  # fmt: skip
    inner = tune.hungry

    def hungry(yes: bool, heard: int) -> None:
        work = tune.campaign
        ready = [node for node in work.tree.nodes.values() if node.ready]
        assert work.stopping or not ready or len(work.running) == slots, "a slot idles"
        inner(yes, heard)

    tune.hungry = hungry  # type: ignore[method-assign]
    work = tune.run(slots)
    assert {one.status for one in trials} <= {"succeeded", "stopped", "failed"}
    assert not work.running
    assert len(runner.trained) == len(set(runner.trained)), "none twice"
    for one in trials:
        path = [step.key for step in one.path]
        if one.status == "succeeded":
            assert set(path) <= set(runner.trained)
            assert tune.reports[one.number][-1]["complete"]
        elif one.status == "failed":
            assert set(path) & runner.fails
            assert one.reason in {f"{key} is not finite" for key in path}
    needed = {key for one in trials for key in [step.key for step in one.path][: one.reached]}
    assert delay or set(runner.trained) == needed, "and nothing that nobody needed"


def test_a_stage_that_is_there_needs_nothing_of_its_trunk() -> None:
    runner = Simulated()
    one = with_trunk(0, [("a", 2.0), ("b", 1.0)])
    search(runner, [one], 1, {one.keys[0]: StageEntry(key=one.keys[0], status="trained", metrics={"set/top1": 1.0})})
    assert runner.trained == ["a2/b@80", "a2/b1/"]


def test_a_failed_stage_fails_the_trials_that_need_it_and_no_others() -> None:
    runner = Simulated(fails=frozenset({"a1/b2/"}))
    chains = [[("a", 1), ("b", 2), ("c", 1)], [("a", 1), ("b", 2)], [("a", 1), ("b", 1)], [("a", 1)]]
    late = trial(4, [("a", 1), ("b", 2), ("c", 3)])
    trials = [trial(number, chain) for number, chain in enumerate(chains)]
    Tune(runner, iter([late]), trials).run(2)
    assert [one.status for one in trials] == ["failed", "failed", "succeeded", "succeeded"]
    assert (trials[1].reason, late.status) == ("a1/b2/ is not finite", "failed")


def test_a_trial_reports_its_chain_in_order_whoever_trains_it() -> None:
    runner = Simulated(measures=1, metric=lambda key, share: len(key) + share)
    first, second = trial(0, [("a", 1), ("b", 1)]), trial(1, [("a", 1), ("b", 2)])
    tune = Tune(runner, iter([second]), [first])
    tune.run(1)
    told = [(r["set/top1"], r["macs"], r["stage"], r["step"], r["reused"], r["whole"], r["complete"])
            for r in tune.reports[1]]  # fmt: skip
    assert told == [(3.5, 0.5, 0, 50, 1.0, False, False), (4.0, 1.0, 0, 100, 1.0, True, False),
                    (6.5, 4.0, 1, 50, 0.5, False, False), (7.0, 7.0, 1, 100, 0.5, True, True)]  # fmt: skip


def test_the_longest_remaining_way_is_trained_first() -> None:
    tree = StageTree()
    tree.add(0, [("a", 1), ("b", 1)])
    tree.add(1, [("a", 1), ("c", 5)])
    tree.add(2, [("d", 3)])
    assert tree.take() == ["a", "c"]
    assert tree.take() == ["d"]
    assert tree.take() == []
    tree.done("a")
    assert tree.take() == ["b"]


def test_a_thousand_chains_on_256_gpus_keep_them_busy_at_little_cost() -> None:
    draw = random.Random(0)
    chains = []
    for _ in range(1000):
        models = sorted(draw.sample("abcdef", draw.randint(2, 4)))
        chains.append([(model, draw.choice([2.0, 4.0, 8.0, 12.0])) for model in models])
    runner = Simulated()
    trials = [trial(number, chain) for number, chain in enumerate(chains)]
    tracemalloc.start()
    began = time.perf_counter()
    before = tracemalloc.get_traced_memory()[0]
    work = search(runner, trials, 256)
    spent, after = time.perf_counter() - began, tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    stages = len(work.tree.nodes)
    critical = max(one.macs for one in trials)
    bound = max(runner.busy / 256, critical)
    assert sorted(runner.trained) == sorted(work.tree.nodes)
    assert bound / runner.clock >= 0.9
    assert spent / stages < 0.2
    assert after - before < 5000 * stages, "with what this test keeps of reports"


def experiment(**search: Any) -> Any:
    return validate(MICRO | {"search": {"space": SPACE} | search})


def test_the_space_has_every_chain_up_to_the_largest_model() -> None:
    space = make_space(experiment())
    assert space.chains == (
        ("CoM-micro-S", "CoM-micro-L"),
        ("CoM-micro-M", "CoM-micro-L"),
        ("CoM-micro-S", "CoM-micro-M", "CoM-micro-L"),
    )
    points = list(space.points())
    assert len(points) == space.size == 2 * 3 + 2 * 3 + 2 * 3 * 3
    chosen = space.chosen(points[0] | {"first": "8 epochs"})
    assert [(stage.model, str(stage.epochs)) for stage in chosen.chain] == [
        ("CoM-micro-S", "8 epochs"),
        ("CoM-micro-L", "1 epochs"),
    ]


def test_the_macs_of_a_choice_are_those_of_its_plan() -> None:
    from raychain.runs.costing import cost_of

    space = make_space(experiment(space=SPACE | {"alpha": [0, 2], "width": ["centred", "embed"]}))
    for params in list(space.points())[::17]:
        assert space.macs(params) == cost_of(space.chosen(params)).cost.macs


def test_what_the_space_says_of_the_transfer_reaches_the_chain() -> None:
    space = make_space(experiment(space=SPACE | {"shrink": [0.2, 1], "width": ["centred", "embed"]}))
    chosen = [space.chosen(params).transfer for params in space.points()]
    assert {(transfer.width, transfer.shrink) for transfer in chosen} == {
        (width, shrink) for width in ("centred", "embed") for shrink in (0.2, 1.0)
    }
    assert all(params["shrink"] == 1 for params in space.planned())


@pytest.mark.parametrize(
    ("search", "where", "fix"),
    [
        ({"trials": 0}, "search.trials", "--trials 1"),
        ({"metric": "i2t_r1"}, "search.metric", "search.metric=zero_shot_top1"),
        ({"space": SPACE | {"budget": "1 %"}}, "search.space.budget", "the cheapest chain is"),
        ({"space": SPACE | {"ratios": [50, 60]}}, "search.space.ratios", "the nearest is"),
        ({"space": SPACE | {"lengths": [9]}}, "search.space.lengths", "set it to 3"),
        ({"space": SPACE | {"models": "CoM-micro-S"}}, "search.space.models", "add models"),
        (
            {"space": SPACE | {"models": ["CoM-micro-S", "CoM-micr-L"]}},
            "search.space.models",
            "Did you mean 'CoM-micro-L'",
        ),
        ({"space": SPACE | {"width": ["none"], "shrink": [0.2, 1]}}, "transfer.shrink", "a random start is"),
        ({"space": SPACE | {"shrink": [2]}}, "search.space.shrink.0", "less than or equal to 1"),
        ({"space": SPACE | {"width": ["centered"]}}, "transfer.width", "did you mean centred?"),
    ],
)
def test_impossible_requests_name_the_nearest_possible_one(
    search: dict[str, Any], where: str, fix: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    file = tmp_path / "micro.yaml"
    file.write_text(yaml.safe_dump(MICRO | {"storage": str(tmp_path / "runs"), "search": {"space": SPACE} | search}))
    monkeypatch.setattr(sys, "argv", ["raychain.search", str(file)])
    with pytest.raises(SystemExit) as stop:
        main(search_command, "search")
    message = capsys.readouterr().err
    assert stop.value.code == 2, message
    assert where in message
    assert fix in message


def test_the_alternative_to_a_budget_that_excludes_all_works() -> None:
    with pytest.raises(InputError) as error:
        make_space(experiment(space=SPACE | {"budget": "1 %"}))
    share = str(error.value).split('raise the budget to "')[1].split('"')[0]
    space = make_space(experiment(space=SPACE | {"budget": share}))
    assert any(space.affordable(params) for params in space.points())
    assert not all(space.affordable(params) for params in space.points())


def test_what_the_planner_proposes_is_tried_as_near_as_the_space_has_it() -> None:
    tree = {k: v for k, v in MICRO.items() if k != "chain"} | {"family": "CoM-micro-{S,M,L}"}
    space = make_space(validate(tree | {"search": {}}))
    first = next(space.planned())
    assert first in list(space.points())
    assert next(make_space(experiment()).planned())["first"] == "8 epochs"


AIMS = {"metric": "top1", "mode": "max"}


@pytest.mark.parametrize("kind", ["tpe", "random", "grid"])
@pytest.mark.parametrize("pareto_too", [False, True])
def test_searchers_choose_within_the_space_and_take_points_first(kind: str, pareto_too: bool) -> None:
    space = make_space(experiment(space=SPACE | {"alpha": {"low": 0, "high": 2, "step": 0.5}}))
    choices, points = Choices.of_space(space), list(space.points())
    assert list(choices.points()) == points
    aims = {"metric": ["top1", "macs"], "mode": ["max", "min"]} if pareto_too else AIMS
    searcher = make_searcher(kind, choices, aims, seed=0, points=points[7:9])[0]
    found = []
    for number in range(15):
        params = choices.decode(searcher.suggest(f"{number}"))
        assert params in points
        assert params is not None
        found.append(params)
        result = {"top1": 10.0 * len(params["chain"]), "macs": float(space.macs(params)), "training_iteration": 1}
        searcher.on_trial_complete(f"{number}", result)
    assert found[:2] == points[7:9]
    assert kind != "grid" or found[2:] == points[:13]


@pytest.mark.parametrize("kind", ["tpe", "random", "grid"])
def test_a_searcher_that_is_restored_goes_on_where_it_was(kind: str, tmp_path: Path) -> None:
    choices = Choices.of_space(make_space(experiment()))

    def suggested(searcher: Any, numbers: Any) -> list[Any]:
        found = []
        for number in numbers:
            found.append(searcher.suggest(f"{number}"))
            searcher.on_trial_complete(f"{number}", {"top1": float(number), "training_iteration": 1})
        return found

    whole, first, again = (make_searcher(kind, choices, AIMS, seed=0, points=[])[0] for _ in range(3))
    wanted = suggested(whole, range(14))
    begun = suggested(first, range(9))
    first.save(str(tmp_path / "state"))
    again.restore(str(tmp_path / "state"))
    assert begun + suggested(again, range(9, 14)) == wanted


def test_suggestions_that_are_none_of_the_space_are_none() -> None:
    choices = Choices.of_space(make_space(experiment()))
    point = next(choices.points())
    assert choices.decode(choices.encode(point)) == point
    assert choices.decode(choices.encode(point, whole=True)) == point
    assert set(choices.encode(point, whole=True)) == {"chain", "first", "grown.CoM-micro-M", "grown.CoM-micro-L"}
    for odd in ({}, {"chain": "x"}, choices.encode(point) | {"first": 9}, choices.encode(point) | {"first": "x"}):
        assert choices.decode(odd) is None


@pytest.mark.parametrize("best", ["high", "low"])
def test_tpe_finds_what_pays(best: str) -> None:
    choices = Choices.of_space(make_space(experiment()))
    sign = 1 if best == "high" else -1

    def worth(params: Any) -> float:
        return 10.0 * (params["first"] == "8 epochs") + 5.0 * (params.get("grown.CoM-micro-L") == "3 epochs")

    searcher = make_searcher("tpe", choices, {"metric": "x", "mode": "max" if sign > 0 else "min"}, seed=0, points=[])[
        0
    ]
    found = []
    for number in range(40):
        params = choices.decode(searcher.suggest(f"{number}"))
        found.append(worth(params))
        searcher.on_trial_complete(f"{number}", {"x": sign * found[-1], "training_iteration": 1})
    assert sum(found[20:]) > sum(found[:20])


def test_a_proxy_shortens_stages_and_warm_ups_alike() -> None:
    tree = MICRO | {"train": MICRO["train"] | {"warmup": "100 steps"}, "search": {"proxy": {"epochs": 0.25}}}
    whole = validate(tree)
    assert whole.search
    assert whole.search.proxy
    small = proxied(whole, whole.search.proxy, None)
    assert [str(stage.epochs) for stage in small.chain] == ["2 epochs", "0.75 epochs"]
    assert str(small.train.warmup) == "25 steps"


def finished(number: int, kind: Any, stages: list[tuple[str, float]], top1: float) -> Trial:
    made = trial(number, stages)
    made.kind, made.status, made.metrics = kind, "succeeded", {"set/top1": top1}
    return made


def test_the_front_has_what_nothing_beats_and_controls_are_compared() -> None:
    chain = finished(0, "sampled", [("a", 4), ("b", 2)], 40.0)
    worse = finished(1, "sampled", [("a", 8), ("b", 8)], 39.0)
    small = finished(2, "control", [("a", 4)], 30.0)
    equal = finished(3, "equal-macs", [("b", 3)], 41.0)
    trials = [chain, worse, small, equal]
    assert [t.number for t in pareto(trials, TOP1)] == [2, 3]
    against = {found.model: found.content() for found in comparisons(trials, chain, TOP1)}
    assert against["a"]["at_equal_macs"]["chain_is_ahead_by"] == 10
    assert against["b"]["at_most"]["chain_is_ahead_by"] == -1


def test_where_lower_is_better_the_lowest_is_best_and_on_the_front() -> None:
    chain = finished(0, "sampled", [("a", 4), ("b", 2)], 0.0)
    worse = finished(1, "sampled", [("a", 8), ("b", 8)], 0.0)
    small = finished(2, "control", [("a", 4)], 0.0)
    equal = finished(3, "equal-macs", [("b", 3)], 0.0)
    for found, loss in ((chain, 2.5), (worse, 2.6), (small, 3.0), (equal, 2.4)):
        found.metrics = {"set/loss": loss}
    trials = [chain, worse, small, equal]
    assert [t.number for t in pareto(trials, LOSS)] == [2, 3]
    assert best_chain(trials, LOSS) is chain
    against = {found.model: found.content() for found in comparisons(trials, chain, LOSS)}
    assert against["a"]["at_equal_macs"] | {"epochs": 0, "macs": 0} == {
        "trial": 2, "epochs": 0, "macs": 0, "set/loss": 3.0, "chain_is_ahead_by": 0.5}  # fmt: skip
    assert against["b"]["at_most"]["chain_is_ahead_by"] == -0.1


def test_chains_are_compared_at_the_same_macs_whenever_they_are_measured() -> None:
    rungs = Rungs(grace=10, factor=2, baseline=1e12)
    assert list(rungs.between(None, Point(8, 16.0))) == []
    assert list(rungs.between(Point(8, 16.0), Point(24, 48.0))) == [Passed(0, 10, 20.0), Passed(1, 20, 40.0)]
    assert list(rungs.between(None, Point(40, 40.0))) == [(0, 10, 10.0), (1, 20, 20.0), (2, 40, 40.0)]
    for key, value in (("a", 20.0), ("b", 30.0)):
        rungs.note(key, Passed(0, 10, value), stopped=False)
    rungs.note("c", Passed(0, 10, 5.0), stopped=True)
    assert rungs.behind == {"c": Verdict(1e11, 5.0, 25.0, 3)}
    assert rungs.ended(["x", "c", "y"]) == rungs.behind["c"]
    assert rungs.ended(["x", "y"]) is None
    again = Rungs(grace=10, factor=2, baseline=1e12)
    again.restore(HalvingRecord.of(json.loads(rungs.state().document())))
    assert (again.passed, again.behind) == (rungs.passed, rungs.behind)


def test_of_a_loss_nothing_is_supposed_before_the_first_measurement() -> None:
    rungs = Rungs(grace=10, factor=2, baseline=1e12, best="low")
    assert list(rungs.between(None, Point(24, 1.0))) == []
    assert list(rungs.between(None, Point(10, 3.0))) == [(0, 10, 3.0)]
    assert list(rungs.between(Point(10, 3.0), Point(30, 1.0))) == [(1, 20, 2.0)], "linear between 3.0 at 10 and 1.0"
    assert rungs.needed([3.0, 4.0, 5.0]) == 4.0


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([(1, 10), (2, 20), (3, 30)]) == 1
    assert rank_correlation([(1, 30), (2, 20), (3, 10)]) == -1
    assert rank_correlation([(1, 1), (2, 3), (3, 2), (4, 4)]) == 0.8
    assert rank_correlation([(1, 1), (2, 2)]) is None


def test_a_cache_that_cannot_be_written_is_one_message_of_a_search() -> None:
    space = {"models": "CoM-micro-{S,M}", "first": "10 steps", "grown": ["4 steps"]}
    tree = {"name": "x", "data": {"train": "none.tar"}, "chain": [{"model": "CoM-micro-S", "epochs": "24 steps"}],
            "preload": {"cache": "/dev/null"}, "search": {"space": space, "trials": 1}}  # fmt: skip
    with pytest.raises(InputError, match=r"^preload\.cache\n"):
        make_space(validate(tree))
