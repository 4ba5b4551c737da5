"""What a user may write is read exactly; what a user gets wrong is answered with where, given, allowed and a fix."""

import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raychain.config import Experiment, load_experiment
from raychain.config.loading import shipped_experiments, validate
from raychain.errors import InputError
from raychain.schema.durations import Duration, parse_bytes, parse_duration, parse_interval

MINIMAL = {
    "name": "tiny",
    "data": {"train": "shards/{0..3}.tar"},
    "chain": [{"model": "CoM-micro-S", "epochs": 3}, {"model": "CoM-micro-M", "epochs": "200 steps"}],
}
FULL = MINIMAL | {
    "data": {
        "train": ["a.tar", "s3://bucket/b-*.tar"],
        "demo": {"out": "shards", "names": 40, "pictures": 500},
        "samples": 1_234_567,
        "captions": {"keys": "json.captions", "per_image": 7},
        "image_size": 40,
        "crop": [0.9, 1.0],
    },
    "transfer": {"distill": None},
    "train": {"lr": "1e-3", "warmup": "10 %", "clip_norm": None, "seed": 7},
    "preload": {"cache": "cache", "budget": "1.5 GiB"},
    "evaluate": {"zero_shot": "test", "retrieval": "val/*.tar", "every": "1234567 samples"},
    "checkpoint": {"every": "5 minutes"},
    "track": {"wandb": "team/project", "mlflow": "sqlite:///mlflow.db"},
    "baseline": {"model": "CoM-micro-M", "epochs": 2.5},
}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return str(path)


def problem(tree: dict[str, object]) -> str:
    """The message that `tree` is answered with."""
    with pytest.raises(InputError) as caught:
        validate(tree, "tiny.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "where", "suggestion"),
    [
        ({"chian": []}, "chian", "did you mean chain?"),
        ({"train": {"globalbatch": 8}}, "train.globalbatch", "did you mean global_batch?"),
        ({"data": {"train": "x", "captions": {"per_img": 2}}}, "data.captions.per_img", "did you mean per_image?"),
        ({"data": {"train": "x", "demo": {"out": "x", "name": 2}}}, "data.demo.name", "did you mean names?"),
        ({"transfer": {"distill": {"alhpa": 2}}}, "transfer.distill.alhpa", "did you mean alpha?"),
        ({"chain": [MINIMAL["chain"][0], {"model": "x", "epoch": 1}]}, "chain.1.epoch", "did you mean epochs?"),
        ({"track": {"wanb": "project"}}, "track.wanb", "did you mean wandb?"),
        ({"allocation": {"ratio": [2, 4]}}, "allocation.ratio", "did you mean ratios?"),
        ({"train": {"zzz": 8}}, "train.zzz", "remove the key"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(
    change: dict[str, object], where: str, suggestion: str
) -> None:
    message = problem(MINIMAL | change)
    assert f"tiny.yaml: {where}\n" in message
    assert f"fix      {suggestion}" in message


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"chain": []}, "chain"),
        ({"chain": {"model": "x"}}, "chain"),
        ({"chain": [{"model": "x", "epochs": 0}]}, "chain.0.epochs"),
        ({"chain": [{"model": "x", "epochs": "3 epochs 100 steps"}]}, "chain.0.epochs"),
        ({"chain": [{"model": "x", "epochs": "10 %"}]}, "chain.0.epochs"),
        ({"data": {"train": []}}, "data.train"),
        ({"data": {"train": "x", "captions": {"keys": []}}}, "data.captions.keys"),
        ({"data": {"train": "x", "crop": [0.9, 0.5]}}, "data.crop"),
        ({"data": {"train": "x", "augment_on": "device"}}, "data.augment_on"),
        ({"train": {"global_batch": 1}}, "train.global_batch"),
        ({"train": {"warmup": 100}}, "train.warmup"),
        ({"train": {"lr": float("nan")}}, "train.lr"),
        ({"train": {"lr": float("inf")}}, "train.lr"),
        ({"train": {"betas": [0.9, 1.0]}}, "train.betas.1"),
        ({"train": {"precision": "fp16"}}, "train.precision"),
        ({"compute": {"gpus_per_worker": 0.5}}, "compute"),
        ({"preload": {"budget": "200 GX"}}, "preload.budget"),
        ({"evaluate": {"every": "0 steps"}}, "evaluate.every"),
        ({"checkpoint": {"every": "0 steps"}}, "checkpoint.every"),
        ({"name": "../up"}, "name"),
        ({"family": ["a", "b"]}, "chain"),
        ({"allocation": {"first": 10}}, "chain"),
        ({"chain": [], "family": []}, "family"),
        ({"chain": [], "family": "a", "allocation": {"rules": [[14, 24]]}}, "allocation.rules.0"),
        ({"chain": [], "family": "a", "allocation": {"ratios": [4, 2]}}, "allocation.ratios"),
        ({"chain": [], "family": "a", "allocation": {"budget": "5 GX"}}, "allocation.budget"),
        ({"chain": [], "family": "a", "allocation": {"first": 0}}, "allocation.first"),
    ],
)
def test_a_wrong_value_is_refused_where_it_stands(change: dict[str, object], where: str) -> None:
    message = problem(MINIMAL | change)
    assert message.startswith(f"tiny.yaml: {where}\n  given    ")
    assert "\n  allowed  " in message
    assert "\n  fix      " in message
    assert "tuple" not in message


def test_every_problem_of_a_file_is_in_the_one_message() -> None:
    message = problem({"name": "tiny", "data": {"train": "x"}, "train": {"lr": -1, "sed": 2}})
    assert all(f"tiny.yaml: {where}\n" in message for where in ("chain", "train.lr", "train.sed"))


def test_an_input_error_reads_the_same_on_the_other_side_of_a_process_boundary() -> None:
    error = InputError("train.lr", -1, "above zero", "correct it")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


FAMILY = {
    "name": "chosen",
    "data": {"train": "x"},
    "family": "CoM-ViT-{S,B,L}-16",
    "allocation": {"first": 128, "rules": [[24, 14]], "ratios": [2, 4], "budget": "30 %", "all_models": True},
}


@pytest.mark.parametrize("tree", [MINIMAL, FULL, FAMILY])
def test_a_dumped_experiment_validates_to_the_same_experiment(tree: dict[str, object]) -> None:
    experiment = validate(tree)
    assert Experiment.model_validate(experiment.model_dump(mode="json")) == experiment
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment


def test_values_are_read_as_written() -> None:
    full = validate(FULL)
    assert full.data.captions.keys == ("json.captions",)
    assert full.train.lr == 1e-3
    assert full.preload.budget == 3 * 2**29
    assert full.checkpoint.every == Duration(300, "s")
    assert full.evaluate.every == Duration(1_234_567, "samples")
    assert full.chain[0].epochs == Duration(3, "epochs")
    assert full.transfer.distill is None


def test_overrides_change_values_lists_and_what_is_absent(file: str) -> None:
    experiment = load_experiment(
        file,
        [
            "train.lr=1e-3",
            "train.global_batch=1e2",
            "chain.1.epochs=7",
            "chain.0.model=CoM-micro-L",
            "data.train=[a.tar, b.tar]",
            "data.captions.keys=json.a",
            "transfer.distill.alpha=5E-1",
            "baseline.model=m",
            "baseline.epochs=100 steps",
            "train.clip_norm=null",
            "name=infinity",
        ],
    )
    assert experiment.train.lr == 1e-3
    assert experiment.train.global_batch == 100
    assert experiment.train.clip_norm is None
    assert [str(stage.epochs) for stage in experiment.chain] == ["3 epochs", "7 epochs"]
    assert experiment.chain[0].model == "CoM-micro-L"
    assert [source.shards for source in experiment.data.train] == [("a.tar",), ("b.tar",)]
    assert experiment.data.captions.keys == ("json.a",)
    assert experiment.transfer.distill is not None
    assert experiment.transfer.distill.alpha == 0.5
    assert experiment.baseline is not None
    assert experiment.name == "infinity"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.lr", "dotted.key=value"),
        ("=3", "dotted.key=value"),
        ("chain.2.epochs=1", "a number from 0 to 1"),
        ("chain.first.epochs=1", "a number from 0 to 1"),
        ("name.first=1", "set name itself"),
        ("train.lr=[1", "quote the value"),
        ("train.lrr=1", "did you mean lr?"),
    ],
)
def test_a_wrong_override_is_refused(file: str, override: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        load_experiment(file, [override])
    assert part in str(caught.value)


@pytest.mark.parametrize("content", ["a: [1", "- 1", "", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(InputError):
        load_experiment(str(tmp_path / "x.yaml"))


def test_a_missing_file_and_a_misspelt_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_experiment(str(tmp_path / "none.yaml"))
    for name in shipped_experiments():
        with pytest.raises(InputError, match="did you mean"):
            load_experiment(name + "x")


@pytest.mark.parametrize(
    ("text", "unit", "steps"),
    [
        ("1000 steps", "steps", 1000),
        ("1 step", "steps", 1),
        ("1e6 samples", "samples", 7812),
        ("1_000 samples", "samples", 8),
        ("2.5 epochs", "epochs", 20),
        ("1 Epoch", "epochs", 8),
        ("10%", "%", 40),
        ("5 percent", "%", 20),
    ],
)
def test_lengths_convert_to_steps(text: str, unit: str, steps: int) -> None:
    length = parse_duration(text, percent=True)
    assert length.unit == unit
    assert length.steps(epoch_samples=1000, global_batch=128, stage_steps=400) == steps


@pytest.mark.parametrize(
    "value", ["3 epochs 200 steps", "3 epochs, 200 steps", "10", 10, "steps", "10 weeks", "-1 steps", True, None, [1]]
)
def test_a_length_without_exactly_one_unit_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="one unit"):
        parse_duration(value)


@given(st.floats(0, 1e15), st.sampled_from(["steps", "samples", "epochs", "%"]))
def test_a_length_reads_back_from_its_text(amount: float, unit: str) -> None:
    length = Duration(amount, unit)
    assert parse_duration(str(length), percent=True) == length


@pytest.mark.parametrize(
    ("text", "seconds"), [("30 seconds", 30), ("30 s", 30), ("5 minutes", 300), ("1 hour", 3600), ("1.5 h", 5400)]
)
def test_intervals_of_time_are_seconds(text: str, seconds: float) -> None:
    assert parse_interval(text) == Duration(seconds, "s")
    assert parse_interval(str(Duration(seconds, "s"))) == Duration(seconds, "s")


@pytest.mark.parametrize(
    ("text", "size"),
    [("200GiB", 200 * 2**30), ("500 MB", 500_000_000), ("1.5kib", 1536), (1024, 1024), ("64K", 65536), ("7 b", 7)],
)
def test_sizes_are_bytes(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("value", ["", "big", "-1 GB", "1 GX", True, 0, "0 GB"])
def test_what_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="200GiB"):
        parse_bytes(value)


def test_a_stage_reads_the_chains_data_but_for_its_own_keys() -> None:
    chain = [
        {"model": "a", "epochs": 1},
        {"model": "b", "epochs": 1, "data": {"train": [{"shards": "y", "weight": 2}, "z"], "crop": None}},
    ]
    data = {"train": "x", "samples": 5, "image_size": 32, "crop": [0.5, 1.0]}
    experiment = validate({"name": "n", "data": data, "chain": chain})
    assert experiment.stage_data(0) == experiment.data
    own = experiment.stage_data(1)
    assert [(source.shards, source.weight) for source in own.train] == [(("y",), 2.0), (("z",), 1.0)]
    assert (own.samples, own.image_size, own.crop) == (None, 32, None)
