"""Dimensions of a search's space: learning rates, and budgets whose shares are searched."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_searching import MICRO

from raychain.config.loading import validate
from raychain.config.search import Proxy
from raychain.errors import InputError
from raychain.runs.resolve import make_task, replan
from raychain.searching.experiments import proxied
from raychain.searching.space import make_space
from raychain.searching.split import nearest_weights, possible_shares, shares

SPLIT = {"total": "30 %", "shares": [1, 2, 3]}


def space_of(tree: dict[str, Any] = MICRO, **space: Any) -> Any:
    return make_space(validate(tree | {"search": {"space": {"models": "CoM-micro-{S,M,L}"} | space}}))


def on_demo(demo: Path, tmp: Path, **train: Any) -> dict[str, Any]:
    """An experiment whose stages have keys."""
    return MICRO | {
        "data": {"train": str(demo / "train")},
        "preload": {"cache": str(tmp / "cache")},
        "storage": str(tmp / "runs"),
        "evaluate": {},
        "train": {"global_batch": 32, "warmup": "10 %"} | train,
    }


def tasks(space: Any, points: list[Any], out: Path, share: float = 1.0) -> list[Any]:
    """What workers would be told of these choices, with a proxy's part of the epochs."""
    base, others = make_task(space.chosen(points[0]), str(out)), space.others(share)
    return [replan(base, proxied(space.chosen(p), Proxy(epochs=share), None), str(out), others) for p in points]


def test_a_learning_rate_is_a_dimension_of_every_stage_or_of_the_grown_ones() -> None:
    space = space_of(first=[4], grown=[1], lr=[1e-3, 5e-4], lengths=[2], models="CoM-micro-{S,L}")
    points = list(space.points())
    assert len(points) == space.size == 4
    found = {tuple(stage.lr for stage in space.chosen(params).chain) for params in points}
    assert found == set(itertools.product((5e-4, 1e-3), repeat=2))
    usual = next(space.planned())
    assert (usual["lr.CoM-micro-S"], usual["lr.CoM-micro-L"]) == (1e-3, 1e-3)
    halved = space_of(MICRO | {"transfer": {"lr_scale": 0.5}}, first=[4], grown=[1], lr=[1e-3, 5e-4])
    assert [v for name, v in next(halved.planned()).items() if name.startswith("lr.")] == [1e-3, 5e-4, 5e-4][
        : len(next(halved.planned())["chain"].split(" → "))
    ]
    scaled = space_of(first=[4], grown=[1], lr_scale=[0.5, 1])
    assert {scaled.chosen(params).transfer.lr_scale for params in scaled.points()} == {0.5, 1.0}
    assert next(scaled.planned())["lr_scale"] == 1


def test_the_same_rate_is_the_same_stage_by_whichever_option(demo: Path, tmp_path: Path) -> None:
    def keys(**space: Any) -> dict[tuple[float, ...], list[str]]:
        made = space_of(on_demo(demo, tmp_path, lr=1e-3), models="CoM-micro-{S,L}", first=[4], grown=[1], **space)
        found = tasks(made, list(made.points()), tmp_path / "out")
        return {tuple(stage.lr for stage in task.stages): [stage.key for stage in task.stages] for task in found}

    plain, scaled, own = keys(), keys(lr_scale=[0.5, 1]), keys(lr=[5e-4, 1e-3])
    assert plain[1e-3, 1e-3] == scaled[1e-3, 1e-3] == own[1e-3, 1e-3]
    assert scaled[1e-3, 5e-4] == own[1e-3, 5e-4]
    assert len({key for found in own.values() for key in found}) == 2 + 4


@pytest.mark.parametrize("distill", [None, {"alpha": 2.0}])
def test_every_split_of_a_budget_costs_the_same(distill: Any) -> None:
    tree = MICRO | {"transfer": {"distill": distill}, "baseline": {"model": "CoM-micro-L", "epochs": 200}}
    for more in ({}, {"alpha": [0, 2]}):
        space = space_of(tree, split=SPLIT, **more)
        points = list(space.points())
        assert len(points) == (7 + 7 + 25) * (2 if more else 1)  # pairs and triples that are no multiples of others
        for params in points:
            assert space.macs(params) == pytest.approx(0.3 * space.baseline_macs, rel=0.01)
            assert space.affordable(params)


def test_a_split_gives_stages_what_their_weights_say() -> None:
    space = space_of(MICRO | {"baseline": {"model": "CoM-micro-L", "epochs": 200}}, split=SPLIT)
    chain = "CoM-micro-S → CoM-micro-M → CoM-micro-L"
    params = {"chain": chain} | {f"share.CoM-micro-{m}": w for m, w in (("S", 1), ("M", 2), ("L", 3))}
    stages, sizes = space.stages(params), {size.name: size for size in space.sizes}
    costs, before = [], None
    for model, length in stages:
        costs.append(space._stage_macs(sizes[model], before, length))
        before = sizes[model]
    assert [cost / sum(costs) for cost in costs] == pytest.approx([1 / 6, 2 / 6, 3 / 6], rel=0.01)
    assert space.nearest(stages) == params
    planned = next(space.planned())
    assert {name for name in planned if name.startswith("share.")} == {
        f"share.{model}" for model in planned["chain"].split(" → ")
    }


@settings(max_examples=200)
@given(
    weights=st.lists(st.integers(1, 12), min_size=1, max_size=5, unique=True),
    stages=st.integers(1, 4),
    scale=st.floats(1e-3, 1e12),
    data=st.data(),
)
def test_shares_add_up_and_a_splits_own_shares_are_nearest_to_it(
    weights: list[int], stages: int, scale: float, data: Any
) -> None:
    chosen = data.draw(st.lists(st.sampled_from(weights), min_size=stages, max_size=stages))
    parts = shares(chosen)
    assert sum(parts) == pytest.approx(1)
    every = itertools.product(weights, repeat=stages)
    assert possible_shares(weights, stages) == tuple(sorted({shares(found)[0] for found in every}))
    assert shares(nearest_weights([part * scale for part in parts], weights)) == pytest.approx(parts)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_stages_that_get_different_shares_have_one_trunk(share: float, demo: Path, tmp_path: Path) -> None:
    """First stages, and those after the same stage, in full and as proxies."""
    tree = on_demo(demo, tmp_path, warmup="4 steps", schedule="wsd")
    space = space_of(tree, split={"total": "60 %", "shares": [1, 2, 3]})
    points = [params for params in space.points() if params["chain"].startswith("CoM-micro-S")]
    found = tasks(space, points, tmp_path / "out", share)
    trunks: dict[str, dict[int, Any]] = {}
    for stage in itertools.chain(*(task.stages for task in found)):
        trunks.setdefault(stage.trunk, {})[stage.steps] = stage
    firsts = trunks[found[0].stages[0].trunk]
    assert {task.stages[0].trunk for task in found} == {found[0].stages[0].trunk}
    assert len(firsts) >= 6
    assert sum(len(same) > 1 for same in trunks.values()) > 1, "later stages share trunks too"
    for same in trunks.values():
        longest = same[max(same)]
        assert all(stage.steps - stage.cooldown in longest.rungs for stage in same.values())


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "grown": ({"split": SPLIT, "grown": [1]}, "search.space", "`split` without `grown`"),
    "rules": ({"split": SPLIT, "rules": [[3, 1]]}, "search.space", "`split` without `rules`"),
    "several": ({"split": SPLIT, "first": [8], "budget": "30 %"}, "search.space", "without `first` and `budget`"),
    "grown and rules": ({"grown": [1], "rules": [[3, 1]]}, "search.space", "either `grown` or `rules`"),
    "both rates": ({"lr": [1e-3], "lr_scale": [1]}, "search.space", "either `lr` or `lr_scale`"),
    "no rate": ({"lr": [0]}, "search.space.lr.0", "greater than 0"),
    "no scale": ({"lr_scale": [-1]}, "search.space.lr_scale.0", "greater than 0"),
    "no total": ({"split": {"shares": [1]}}, "search.space.split.total", "this key is required"),
    "no shares": ({"split": {"total": "9 %", "shares": []}}, "search.space.split.shares", "at least 1"),
    "half a share": ({"split": {"total": "9 %", "shares": [0.5]}}, "search.space.split.shares.0", "integer"),
    "nothing": ({"split": {"total": 1e6, "shares": [1]}}, "search.space.split.total", "raise it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_searched_is_one_message(case: str) -> None:
    own, where, says = WRONG[case]
    with pytest.raises(InputError) as error:
        space_of(**own)
    assert where in str(error.value)
    assert says in str(error.value)
    assert not error.value.args[4:]


def test_the_total_that_is_proposed_is_enough() -> None:
    with pytest.raises(InputError) as error:
        space_of(split={"total": 1e6, "shares": [1]})
    space_of(split={"total": str(error.value.args[2]).split("least ")[1].split(" of")[0], "shares": [1]})
