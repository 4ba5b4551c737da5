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
from raychain.searching.campaign import Campaign, Job, JobEnded, StageDone, Trial, ratio
from raychain.searching.experiments import proxied
from raychain.searching.halving import Halving, Point, Verdict
from raychain.searching.outcome import best_chain, comparisons, pareto, rank_correlation
from raychain.searching.sampling import make_sampler
from raychain.searching.space import make_space
from raychain.searching.tree import StageTree

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


def trial(number: int, stages: list[tuple[str, float]]) -> Trial:
    """A chain of (model, epochs) whose keys stand for all that comes before, as real ones do."""
    keys = list(itertools.accumulate(f"{model}{epochs:g}/" for model, epochs in stages))
    made = [Stage(key, model, epochs, epochs * 3 ** ord(model[0]) / 3 ** ord("a"))
            for key, (model, epochs) in zip(keys, stages, strict=True)]  # fmt: skip
    return Trial(number, "sampled", {"number": number}, Chain(tuple(made)))  # type: ignore[arg-type]


@dataclass
class Simulated:
    """Trains stages in no time of ours, on a clock of its own."""

    fails: frozenset[str] = frozenset()
    stops_after: int | None = None
    clock: float = 0.0
    busy: float = 0.0
    trained: list[str] = field(default_factory=list)
    events: list[tuple[float, int, StageDone | JobEnded]] = field(default_factory=list)
    order: Any = field(default_factory=itertools.count)

    def start(self, job: Job) -> None:
        at, costs = self.clock, {step.key: step.share * step.stage.macs for step in job.trial.path}
        for key in job.keys:
            at += costs[key]
            if key in self.fails:
                self._push(at, JobEnded(job, f"{key} is not finite"))
                return
            if self.stops_after is not None and len(self.trained) >= self.stops_after:
                self._push(at, JobEnded(job, stopped=True))
                return
            self.trained.append(key)
            self.busy += costs[key]
            self._push(at, StageDone(job, key, StageEntry(key=key, status="trained", metrics={"top1": 1.0})))
        self._push(at, JobEnded(job))

    def wait(self) -> StageDone | JobEnded:
        self.clock, _, notice = heapq.heappop(self.events)
        return notice

    def cut(self, job: Job) -> None:
        """What it would have trained from now on it has not."""
        left = [found for found in self.events if found[2].job is job]
        self.events = [found for found in self.events if found[2].job is not job]
        heapq.heapify(self.events)
        for _, _, notice in left:
            if isinstance(notice, StageDone):
                self.trained.remove(notice.key)
        self._push(self.clock, JobEnded(job, stopped=True))

    def _push(self, at: float, notice: StageDone | JobEnded) -> None:
        heapq.heappush(self.events, (at, next(self.order), notice))


def campaign(runner: Simulated, slots: int, known: dict[str, StageEntry] | None = None) -> Campaign:
    return Campaign(runner, slots, known=lambda step: (known or {}).get(step.key))


def with_trunk(number: int, stages: list[tuple[str, float]]) -> Trial:
    """As `trial`, of stages of 100 steps an epoch whose last 20 % are a cool-down; lengths are 1 or 2 epochs."""
    made = trial(number, stages)
    for stage in made.task.stages:
        stage.steps, stage.rungs = int(100 * stage.epochs), (80,) if stage.epochs == 1 else (80, 160)  # type: ignore
        stage.trunk = stage.key.rsplit(f"{stage.epochs:g}/", 1)[0]  # type: ignore[misc]
    return made


def stopped(runner: Simulated, trials: list[Trial], slots: int) -> Campaign:
    """A campaign of all trials that was stopped after `runner.stops_after` stages, if it has more."""
    work = campaign(runner, slots)
    for one in trials:
        work.add(one)
    assert runner.stops_after is not None
    work.stopping = len({step.key for one in trials for step in one.path}) > runner.stops_after
    while work.running or not work.stopping:
        if work.run(lambda: None) or work.stopping:
            break
    return work


CHAINS = st.lists(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([1.0, 2.0])), min_size=1, max_size=4),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(CHAINS, st.integers(1, 5), st.booleans())
def test_every_trial_ends_and_no_stage_is_trained_twice(chains: Any, slots: int, at_once: bool) -> None:
    runner = Simulated()
    work = campaign(runner, slots)
    trials = [trial(number, chain) for number, chain in enumerate(chains)]
    if at_once:
        for one in trials:
            work.add(one)
    source = iter([] if at_once else trials)
    assert work.run(lambda: next(source, None))
    assert {one.status for one in trials} == {"succeeded"}
    needed = {key for one in trials for key in one.keys}
    assert sorted(runner.trained) == sorted(needed)
    requested, trained = ratio(trials, set(runner.trained))
    assert trained <= requested


@settings(max_examples=100, deadline=None)
@given(CHAINS, st.integers(1, 4), st.integers(0, 10))
def test_a_search_that_was_stopped_goes_on_and_trains_the_rest(chains: Any, slots: int, after: int) -> None:
    runner = Simulated(stops_after=after)
    trials = [trial(number, chain) for number, chain in enumerate(chains)]
    first = stopped(runner, trials, slots)
    again = Simulated()
    second = campaign(again, slots, {key: StageEntry(key=key, status="trained") for key in runner.trained})
    cut = {job.trial.number for job in first.cut}
    for one in [trial(number, chain) for number, chain in enumerate(chains)]:
        second.resume(one) if one.number in cut else second.add(one)
    assert second.run(lambda: None)
    assert not set(again.trained) & set(runner.trained)
    assert {one.status for one in second.trials.values()} == {"succeeded"}


@settings(max_examples=100, deadline=None)
@given(CHAINS, st.integers(1, 4), st.integers(0, 12))
def test_stages_that_differ_in_length_share_their_trunk(chains: Any, slots: int, after: int) -> None:
    runner = Simulated(stops_after=after)
    trials = [with_trunk(number, chain) for number, chain in enumerate(chains)]
    nodes = {step.key: step.share * step.stage.epochs for one in trials for step in one.path}
    stopped(runner, trials, slots)
    again = Simulated()
    second = campaign(again, slots, {key: StageEntry(key=key, status="trained") for key in runner.trained})
    for one in [with_trunk(number, chain) for number, chain in enumerate(chains)]:
        second.add(one)
    assert second.run(lambda: None)
    assert {one.status for one in second.trials.values()} == {"succeeded"}
    assert sorted(again.trained + runner.trained) == sorted(nodes), "every part once, an interruption or not"
    requested, trained = ratio(trials, set(nodes))
    assert trained == pytest.approx(sum(nodes.values()))
    assert requested == pytest.approx(sum(epochs for chain in chains for _, epochs in chain))


def test_at_a_rung_the_best_of_those_that_passed_it_go_on() -> None:
    halving = Halving(grace=10, factor=2)
    assert halving.judge(["a"], Point(10, 30.0)) is None, "the first has no rivals"
    assert halving.judge(["b"], Point(10, 40.0)) is None
    assert halving.judge(["c"], Point(10, 35.0)) is None
    verdict = halving.judge(["d"], Point(10, 20.0))
    assert verdict == Verdict(10, 20.0, 32.5, 4)
    assert halving.ended(["d", "e"]) == verdict
    assert halving.ended(["a", "e"]) is None


def test_chains_are_compared_at_the_same_macs_whenever_they_are_measured() -> None:
    halving = Halving(grace=10, factor=2)
    halving.judge(["a"], Point(8, 16.0))
    halving.judge(["a", "b"], Point(24, 48.0))
    assert halving.passed == {0: {"b": 20.0}, 1: {"b": 40.0}}
    halving.judge(["c"], Point(40, 40.0))
    assert halving.passed == {0: {"b": 20.0, "c": 10.0}, 1: {"b": 40.0}}, "it ends at the first rung where it is behind"
    again = Halving(grace=10, factor=2)
    again.restore(HalvingRecord.of(json.loads(halving.state().document())))
    assert (again.passed, again.behind) == (halving.passed, halving.behind)
    assert again.judge(["a", "b"], Point(24, 48.0)) is None, "judged once"


@settings(max_examples=150, deadline=None)
@given(CHAINS, st.integers(1, 4), st.integers(0, 1000))
def test_stopped_trials_free_their_worker_groups_and_leave_the_others_their_stages(
    chains: Any, slots: int, seed: int
) -> None:
    runner, chance = Simulated(), random.Random(seed)
    trials = [trial(number, chain) for number, chain in enumerate(chains)]

    def finished(key: str, *_: Any) -> None:
        if chance.random() < 0.4:
            running = [t for t in work.trials.values() if t.status == "running" and key in t.keys[:-1]]
            work.drop([t for t in running if chance.random() < 0.7], "behind")

    work = Campaign(runner, slots, known=lambda _: None, finished=finished)
    source = iter(trials)
    assert work.run(lambda: next(source, None))
    assert {one.status for one in trials} <= {"succeeded", "stopped"}
    assert not work.running
    assert not work.cut, "nothing of them is left to be continued"
    needed = {key for one in trials if one.status == "succeeded" for key in one.keys}
    assert len(runner.trained) == len(set(runner.trained))
    assert needed <= set(runner.trained)
    reached = {step.key for one in trials for step in one.path[: one.reached]}
    assert set(runner.trained) == reached, "and nothing that nobody needed"
    requested, trained = ratio(trials, set(runner.trained))
    assert trained <= requested


def test_a_stage_that_is_there_needs_nothing_of_its_trunk() -> None:
    runner = Simulated()
    one = with_trunk(0, [("a", 2.0), ("b", 1.0)])
    work = campaign(runner, 1, {one.keys[0]: StageEntry(key=one.keys[0], status="trained")})
    work.add(one)
    assert work.run(lambda: None)
    assert runner.trained == ["a2/b@80", "a2/b1/"]


def test_a_failed_stage_fails_the_trials_that_need_it_and_no_others() -> None:
    runner = Simulated(fails=frozenset({"a1/b2/"}))
    work = campaign(runner, 2)
    chains = [[("a", 1), ("b", 2), ("c", 1)], [("a", 1), ("b", 2)], [("a", 1), ("b", 1)], [("a", 1)]]
    for number, chain in enumerate(chains):
        work.add(trial(number, chain))
    assert work.run(lambda: None)
    assert [work.trials[n].status for n in range(4)] == ["failed", "failed", "succeeded", "succeeded"]
    assert work.trials[1].reason == "a1/b2/ is not finite"
    late = trial(4, [("a", 1), ("b", 2), ("c", 3)])
    work.add(late)
    assert late.status == "failed"


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
    work = campaign(runner, 256)
    tracemalloc.start()
    began = time.perf_counter()
    for number, chain in enumerate(chains):
        work.add(trial(number, chain))
    before = tracemalloc.get_traced_memory()[0]
    assert work.run(lambda: None)
    spent, after = time.perf_counter() - began, tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    stages = len(work.tree.nodes)
    critical = max(node.longest for node in work.tree.nodes.values() if node.parent is None)
    bound = max(runner.busy / 256, critical)
    assert sorted(runner.trained) == sorted(work.tree.nodes)
    assert bound / runner.clock >= 0.9
    assert spent / stages < 0.2
    assert after - before < 2000 * stages


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


@pytest.mark.parametrize("kind", ["tpe", "random", "grid"])
@pytest.mark.parametrize("pareto_too", [False, True])
def test_samplers_choose_within_the_space_and_take_fixed_choices(kind: str, pareto_too: bool) -> None:
    space = make_space(experiment(space=SPACE | {"alpha": {"low": 0, "high": 2, "step": 0.5}}))
    sampler = make_sampler(space, kind, 0, pareto=pareto_too)
    points = list(space.points())
    fixed = points[7]
    assert sampler.ask(fixed) == fixed
    sampler.tell(fixed, (30.0, 1e9))
    for _ in range(15):
        params = sampler.ask()
        assert params in points
        assert params is not None
        sampler.tell(params, (10.0 * len(params["chain"]), float(space.macs(params))))


def test_tpe_finds_what_pays() -> None:
    space = make_space(experiment())

    def worth(params: Any) -> float:
        return 10.0 * (params["first"] == "8 epochs") + 5.0 * (params.get("grown.CoM-micro-L") == "3 epochs")

    sampler = make_sampler(space, "tpe", 0, pareto=False)
    found = []
    for _ in range(40):
        params = sampler.ask()
        found.append(worth(params))
        sampler.tell(params or {}, (found[-1], 1.0))
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


def test_halving_of_a_loss_ends_chains_with_higher_ones_and_supposes_nothing_before_the_first_measurement() -> None:
    halving = Halving(grace=10, factor=2, best="low")
    assert halving.judge(["early"], Point(24, 1.0)) is None
    assert halving.passed == {}, "nothing is known of a loss at 10 or 20 MACs"
    for key, loss in (("a", 3.0), ("b", 4.0), ("c", 3.5)):
        verdict = halving.judge([key], Point(10, loss))
        assert (verdict is not None) == (key == "b"), key
    assert halving.judge(["d"], Point(10, 2.9)) is None
    assert halving.judge(["a", "a2"], Point(30, 1.0)) is None
    assert halving.passed[1] == {"a2": 2.0}, "linear between 3.0 at 10 and 1.0 at 30"


def test_tpe_looks_for_the_lowest_where_lower_is_better() -> None:
    space = make_space(experiment())

    def loss(params: Any) -> float:
        return 30.0 - 10.0 * (params["first"] == "8 epochs") - 5.0 * (params.get("grown.CoM-micro-L") == "3 epochs")

    sampler = make_sampler(space, "tpe", 0, pareto=False, best="low")
    found = []
    for _ in range(40):
        params = sampler.ask()
        found.append(loss(params))
        sampler.tell(params, (found[-1], 1.0))
    assert sum(found[20:]) < sum(found[:20])


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
