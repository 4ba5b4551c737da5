"""Evaluators by name: what `evaluate:` may say, metrics with unit and direction, and what a stage's record keeps."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest

from raychain.config.loading import validate
from raychain.errors import InputError
from raychain.evaluators.metrics import (
    FORMER,
    MULTILABEL,
    RETRIEVAL,
    ZERO_SHOT,
    Metric,
    define,
    find,
    means,
    read_back,
    written_down,
)
from raychain.evaluators.suite import Evaluation, Suite
from raychain.records import StageRecord

BASE: dict[str, Any] = {"name": "x", "data": {"train": "a.tar"}, "chain": [{"model": "CoM-micro-S", "epochs": 1}]}
NAMED = {
    "imagenet": {"type": "zero_shot", "data": "data/imagenet"},
    "coco": {"type": "retrieval", "data": "data/coco", "captions": "txt|lines"},
}


def evaluate(written: Any) -> Any:
    return validate(BASE | {"evaluate": written}).evaluate


def test_any_number_of_evaluators_stands_beside_the_short_forms() -> None:
    found = evaluate(NAMED | {"retrieval": "val/*.tar", "zero_shot": "z", "every": "1 epochs"})
    assert list(found.named) == ["zero_shot", "imagenet", "coco", "retrieval"]
    assert found.named["retrieval"].data == ("val/*.tar",)
    assert found.named["coco"].captions == ("txt|lines",)
    names = [definition.name for definition in found.definitions]
    assert names[:4] == ["zero_shot/top1", "zero_shot/top5", "imagenet/top1", "imagenet/top5"]
    assert "coco/i2t_r1" in names
    assert {d.former for d in found.definitions if d.former} == {
        "zero_shot_top1", "zero_shot_top5", *(metric.key for metric in RETRIEVAL)}  # fmt: skip


@pytest.mark.parametrize(
    ("written", "score"),
    [
        ({}, None),
        ({"every": "1 epochs"}, None),
        ({"retrieval": "r", "zero_shot": "z"}, "zero_shot/top1"),
        ({"retrieval": "r"}, "retrieval/i2t_r1"),
        (NAMED, "imagenet/top1"),
        (NAMED | {"score": "coco/t2i_r5"}, "coco/t2i_r5"),
        ({"zero_shot": "z", "retrieval": "r", "score": "t2i_r1"}, "retrieval/t2i_r1"),
    ],
)
def test_the_score_is_the_first_metric_of_the_first_evaluator_unless_it_is_named(written: Any, score: Any) -> None:
    found = evaluate(written).judged_by
    assert (found.name if found else None) == score


@pytest.mark.parametrize("written", [{}, {"zero_shot": "z"}, NAMED | {"zero_shot": "z", "score": "zero_shot/top5"}])
def test_what_is_dumped_is_read_as_the_same(written: Any) -> None:
    whole = validate(BASE | {"evaluate": written})
    for mode in ("json", "python"):
        for exclude_unset in (True, False):
            assert validate(whole.model_dump(mode=mode, exclude_unset=exclude_unset)) == whole
    assert json.dumps(whole.model_dump(mode="json"))


def test_the_short_forms_are_dumped_as_they_always_were() -> None:
    plain = evaluate({"retrieval": "r", "zero_shot": "z"}).model_dump(mode="json")
    assert plain == {"zero_shot": "z", "retrieval": ["r"], "every": None}
    assert evaluate({}).model_dump(mode="json") == {"zero_shot": None, "retrieval": None, "every": None}


@pytest.mark.parametrize(
    ("written", "where", "allowed", "fix"),
    [
        ({"zero_shots": "z"}, "evaluate.zero_shots", "a mapping with `type`", "did you mean zero_shot?"),
        ({"evry": "1 epochs"}, "evaluate.evry", "a mapping with `type`", "did you mean every?"),
        ({"food": {"type": "zeroshot", "data": "d"}}, "evaluate.food.type", "zero_shot, retrieval", "zero_shot?"),
        ({"food": {"typ": "zero_shot", "data": "d"}}, "evaluate.food.type", "zero_shot", "did you mean type?"),
        ({"food": {"type": ["zero_shot"], "data": "d"}}, "evaluate.food.type", "zero_shot", "did you mean zero_shot?"),
        ({"food": {"type": "zero_shot", "dta": "d"}}, "evaluate.food.dta", "type, data", "did you mean data?"),
        ({"food": {"type": "zero_shot"}}, "evaluate.food.data", "required", "add evaluate.food.data"),
        ({"coco": {"type": "retrieval", "data": []}}, "evaluate.coco.data", "at least 1", "correct evaluate.coco.data"),
        ({"retrieval": []}, "evaluate.retrieval", "at least 1", "correct evaluate.retrieval"),
        ({"coco": {"type": "retrieval", "data": "d", "captions": "txt|x"}}, "evaluate.coco.captions", "txt", "correct"),
        ({"a/b": {"type": "zero_shot", "data": "d"}}, "evaluate.a/b", "letters", "another name"),
        ({"score": "zero_shot/top1"}, "evaluate.score", "nothing is measured", "add it"),
        (NAMED | {"score": "imagenet/top2"}, "evaluate.score", "imagenet/top1", "did you mean imagenet/top"),
        ({"every": {"type": "zero_shot", "data": "d"}}, "evaluate.every", "one unit", "correct evaluate.every"),
        ("vtab", "evaluate", "", ""),
    ],
)
def test_what_is_wrong_is_one_message_each(written: Any, where: str, allowed: str, fix: str) -> None:
    with pytest.raises(InputError) as error:
        evaluate(written)
    assert f"experiment: {where}" in str(error.value).splitlines()
    assert allowed in str(error.value)
    assert fix in str(error.value)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(InputError) as error:
        evaluate({"a": {"type": "zero"}, "b": "x", "c": {"type": "zero_shot"}, "every": "3"})
    for where in ("evaluate.a.type", "evaluate.b", "evaluate.c.data", "evaluate.every"):
        assert f"{where}\n" in str(error.value)


def test_definitions_survive_files_and_files_without_them_mean_the_former_ones() -> None:
    made = (
        *define("imagenet", "zero_shot", ZERO_SHOT),
        *define("book", "perplexity", [Metric("x", "X", "nats", "low")]),
    )
    assert read_back(json.loads(json.dumps({"metrics": written_down(made)}))) == made
    for document in ({}, {"metrics": None}, {"metrics": {"a/b": 3}}, {"metrics": []}):
        assert read_back(document) == FORMER
    assert [d.former for d in FORMER if d.brief] == ["zero_shot_top1", "i2t_r1", "t2i_r1"]
    assert find(made, "book/x", "here").best == "low"
    assert find(FORMER, "i2t_r1", "here").name == "retrieval/i2t_r1"


def test_numbers_are_written_by_unit() -> None:
    [nats] = define("book", "perplexity", [Metric("loss", "loss", "nats", "low")])
    assert (FORMER[0].written(31.25), nats.written(2.847), nats.written(None)) == ("31.2 %", "2.85 nats", "– nats")
    assert nats.rank(2.0) > nats.rank(3.0)
    assert FORMER[0].rank(2.0) < FORMER[0].rank(3.0)
    assert FORMER[0].value({"zero_shot_top1": float("nan")}) is None
    assert FORMER[0].value({"zero_shot_top1": 3, "zero_shot/top1": 4}) == 4


def test_means_are_over_all_evaluators_of_a_type_and_only_where_all_are_measured() -> None:
    made = [d for name in "abc" for d in define(name, "zero_shot", ZERO_SHOT)]
    made += define("p", "linear_probe", [Metric("top1", "top-1", "%", "high")])
    metrics = {"a/top1": 10.0, "b/top1": 20.0, "c/top1": 60.0, "p/top1": 90.0}
    [mean] = means(made, metrics)
    assert (mean.value, mean.definition.label) == (30.0, "mean of 3 × zero shot top1")
    assert means(made, {"a/top1": 10.0, "b/top1": 20.0, "p/top1": 90.0}) == []
    made += define("m", "zero_shot_multilabel", MULTILABEL)
    made = list(read_back(json.loads(json.dumps({"metrics": written_down(made)}))))
    [mean] = means(made, metrics | {"m/map": 10.0})
    assert (mean.value, mean.definition.label) == (25.0, "mean of 4 × zero shot (3 top1, 1 map)")


@dataclass(frozen=True)
class Fixed:
    """Held-out data by its digest alone."""

    digest: str
    samples: int = 7

    def run(self, model: Any, context: Any) -> dict[str, float]:
        return {}


def evaluation(name: str, kind: str, digest: str) -> Evaluation:
    return Evaluation(name, Fixed(digest), define(name, kind, ZERO_SHOT if kind == "zero_shot" else RETRIEVAL))


def test_a_record_keeps_what_others_measured_and_only_new_sets_are_missing() -> None:
    food, cars = evaluation("food", "zero_shot", "f"), evaluation("cars", "zero_shot", "c")
    first = Suite((food,))
    record = first.recorded(StageRecord(key="k"), {"f": {"top1": 10.0, "top5": 20.0}})
    assert record.metrics == {"food/top1": 10.0, "food/top5": 20.0}
    assert record.evaluation == first.digest

    both = Suite((cars, replace(food, name="dishes", definitions=define("dishes", "zero_shot", ZERO_SHOT))))
    assert [found.name for found in both.missing(record)] == ["cars"]
    assert both.shown(record).metrics == {"dishes/top1": 10.0, "dishes/top5": 20.0}, "its data is what it was"
    later = both.recorded(record, both.results(record) | {"c": {"top1": 1.0, "top5": 2.0}})
    assert not first.missing(later)
    assert first.shown(later).metrics == record.metrics
    assert both.recorded(record, both.results(record)).evaluation is None, "one is missing"
    assert Suite().missing(StageRecord(key="k")) == ()


def of_before(metrics: dict[str, float], evaluation: str | None) -> StageRecord:
    """A stage's record as raychain 0.1 wrote it."""
    return StageRecord(key="k", metrics=dict(metrics), evaluation=evaluation)


def test_records_of_before_are_read_whichever_of_the_two_sets_they_had() -> None:
    zero_shot, retrieval = evaluation("zero_shot", "zero_shot", "z"), evaluation("retrieval", "retrieval", "r")
    both, alone = Suite((zero_shot, retrieval)), Suite((zero_shot,))
    values = {"zero_shot_top1": 1.0, "zero_shot_top5": 2.0, "i2t_r1": 3.0}
    assert both.missing(of_before(values, both.digest)) == ()
    assert both.missing(of_before(values, alone.digest)) == (retrieval,)
    assert both.missing(of_before(values, Suite((retrieval,)).digest)) == (zero_shot,)
    for other in ("else", None):
        assert both.missing(of_before(values, other)) == both.evaluations
    shown = both.shown(of_before(values, both.digest)).metrics
    assert shown == {**values, "zero_shot/top1": 1.0, "zero_shot/top5": 2.0, "retrieval/i2t_r1": 3.0}
    assert both.digest == "597bc6640aebab109c8ce3122dc357c0", "as raychain 0.1 wrote it"
