"""`raychain plan` says what a run would cost, without the data, and proposes chains; wrong input is one message."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import raychain
from raychain.cli.plan import plan_command
from raychain.cli.program import main
from raychain.cli.run import run_command
from raychain.config import load_experiment
from raychain.config.loading import validate
from raychain.errors import InputError
from raychain.reporting.plan_table import plan_table
from raychain.runs.costing import cost_of, proposals_for, with_chain
from raychain.runs.resolve import dry_plan

KEYS = {"stages", "macs", "baseline", "percent_of_baseline", "speedup", "family_speedup", "warnings"}
STAGE_KEYS = {"model", "params", "forward_macs", "epochs", "macs", "share", "expansion_ratio"}
SHIPPED = {  # percentage of the baseline, family ratio (docs/method.md); None: not published
    "cc3m-vit-bl": (47.8, None),
    "cc3m-vit-sbl": (35.9, None),
    "cc3m-vit-tsbl": (27.6, 5.68),
    "cc3m-vit-family": (27.6, 5.68),
    "cc3m-vit-family7": (None, 7.09),
    "merged15m-vit-smbl": (None, None),
    "cc3m-swin-tsbl": (None, None),
}
VITS = {
    "name": "vits",
    "data": {"train": "nowhere/{0..3}.tar", "samples": 2_890_000, "captions": {"per_image": 7}},
    "family": "CoM-ViT-{T,S,B,L}-16",
}
MICRO = {
    "name": "micro",
    "data": {"train": "nowhere/{0..3}.tar", "samples": 16_000},
    "chain": [{"model": "CoM-micro-S", "epochs": 8}, {"model": "CoM-micro-M", "epochs": 3}],
    "train": {"global_batch": 128},
}


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `raychain plan` on an experiment tree; returns status, stdout, stderr."""

    def call(tree: dict[str, Any], *arguments: str) -> tuple[int, str, str]:
        file = tmp_path / "experiment.yaml"
        file.write_text(yaml.safe_dump({"storage": str(tmp_path / "runs")} | tree))
        monkeypatch.setattr(sys, "argv", ["raychain.plan", str(file), *arguments])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as stop:
            main(plan_command, "plan")
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_experiments_cost_what_the_paper_says(name: str) -> None:
    percent, family = SHIPPED[name]
    plan = raychain.plan(name)
    assert plan.keys() >= KEYS
    assert all(stage.keys() >= STAGE_KEYS for stage in plan["stages"])
    assert sum(stage["macs"] for stage in plan["stages"]) == plan["macs"]
    assert sum(stage["share"] for stage in plan["stages"]) == pytest.approx(1, abs=1e-3)
    assert plan["speedup"] == pytest.approx(100 / plan["percent_of_baseline"], rel=1e-3)
    if percent:
        assert plan["percent_of_baseline"] == pytest.approx(percent, abs=0.1)
    if family:
        assert plan["family_speedup"] == pytest.approx(family, abs=0.02)
    assert plan["baseline"]["model"].split("-")[2] == "L"


def test_the_demo_is_planned_before_its_data_is_there_and_as_a_run_counts_it(tmp_path: Path) -> None:
    experiment = load_experiment("demo", [f"data.demo.out={tmp_path}/demo", f"data.train={tmp_path}/demo/train"])
    plan = raychain.plan(experiment)
    dry = dry_plan(experiment)["stages"]
    assert [stage["macs"] for stage in plan["stages"]] == [stage["macs"] for stage in dry]
    assert [stage["params"] for stage in plan["stages"]] == [stage["params"] for stage in dry]
    assert plan["samples"] == 16_000


def test_shards_that_are_there_are_counted(tree: dict[str, Any]) -> None:
    plan = raychain.plan(validate(tree))
    assert plan["samples"] == 1200
    assert [stage["samples_seen"] for stage in plan["stages"]] == [24 * 32, 16 * 32]
    assert [stage["epochs"] for stage in plan["stages"]] == [0.64, 0.4267]


def test_stages_with_data_of_their_own_are_costed_on_it() -> None:
    tree = MICRO | {"chain": [MICRO["chain"][0], {"model": "CoM-micro-M", "epochs": 3, "data": {"image_size": 48}}]}
    larger, same = (raychain.plan(validate(t))["stages"][1] for t in (tree, MICRO))
    assert larger["forward_macs"] > same["forward_macs"]


@pytest.mark.parametrize("distill", [None, {"alpha": 0}], ids=["null", "alpha 0"])
def test_without_distillation_there_is_no_teacher_to_pay(distill: dict[str, float] | None) -> None:
    plan = raychain.plan(validate(MICRO | {"transfer": {"distill": distill}}))
    assert plan["stages"][1]["macs"] == 3 * plan["stages"][1]["forward_macs"] * plan["stages"][1]["samples_seen"]


def test_a_baseline_in_the_file_is_what_counts() -> None:
    plan = raychain.plan(validate(MICRO | {"baseline": {"model": "CoM-micro-L", "epochs": 4}}))
    assert (plan["baseline"]["model"], plan["baseline"]["epochs"]) == ("CoM-micro-L", 4)
    alone = sum(3 * 4 * 16_000 * stage["forward_macs"] for stage in plan["stages"])
    assert plan["family_speedup"] == pytest.approx(alone / plan["macs"], rel=1e-3)


def test_one_model_alone_is_a_chain_too() -> None:
    plan = raychain.plan(validate(MICRO | {"chain": MICRO["chain"][:1]}))
    assert (plan["percent_of_baseline"], plan["speedup"], plan["warnings"]) == (100, 1, [])


def test_missing_shards_say_what_to_give(command: Any) -> None:
    tree = MICRO | {"data": {"train": "nowhere/{0..3}.tar"}}
    code, _, message = command(tree)
    assert code == 2
    assert "data.train" in message
    assert "--set data.samples=N" in message
    assert command(tree, "--set", "data.samples=16000")[0] == 0


def test_json_is_all_that_is_printed(command: Any) -> None:
    code, out, err = command(MICRO, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out).keys() >= KEYS


def test_the_table_fits_80_columns(command: Any) -> None:
    code, out, _ = command(VITS, "--tflops", "400", "--mfu", "0.5")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    for part in ("CoM-ViT-T-16", "27.6 %", "5.68×", "time", "1 × 400 TFLOP/s at 50 %", "chosen of 35 chains", "next:"):
        assert part in out


def test_a_family_becomes_the_first_proposals_chain() -> None:
    experiment = validate(VITS)
    proposals, samples = proposals_for(experiment)
    assert samples == 2_890_000
    resolved = with_chain(experiment)
    assert [stage.model for stage in resolved.chain] == list(proposals[0].cost.models)
    assert [stage.epochs.amount for stage in resolved.chain] == [128, 24, 19, 14]
    assert (resolved.family, resolved.allocation) == (None, None)
    assert type(resolved).model_validate(resolved.model_dump(mode="json")) == resolved
    assert with_chain(resolved) is resolved
    assert cost_of(resolved).cost.macs == proposals[0].cost.macs
    assert [stage.model for stage in with_chain(experiment, proposals[-1]).chain] == list(proposals[-1].cost.models)


def test_a_family_plan_shows_why_and_what_else(command: Any) -> None:
    plan = json.loads(command(VITS, "--json")[1])
    assert [stage["epochs"] for stage in plan["stages"]] == [128, 24, 19, 14]
    assert plan["proposals"][0]["percent_of_baseline"] == plan["percent_of_baseline"]
    assert plan["proposed_from"] == 7 * 5
    assert len(plan["why"]) == 4
    assert all(proposal["warnings"] for proposal in plan["proposals"] if proposal["breaks"])


def test_a_run_of_a_family_trains_the_first_proposal(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--dry-run` goes the way of a run up to the start of Ray; what it prints is what run.json holds."""
    file = tmp_path / "family.yaml"
    chosen = {"family": "CoM-micro-{T,S,M}", "allocation": {"first": 4}}
    file.write_text(yaml.safe_dump({key: value for key, value in tree.items() if key != "chain"} | chosen))
    monkeypatch.setattr(sys, "argv", ["raychain.run", str(file), "--dry-run", "--json"])
    with pytest.raises(SystemExit) as stop:
        main(run_command, "run")
    assert not stop.value.code
    shown = capsys.readouterr()
    planned = raychain.plan(str(file))
    chain = [(stage["model"], stage["epochs"]) for stage in json.loads(shown.out)["config"]["chain"]]
    assert chain == [(stage["model"], f"{stage['epochs']:g} epochs") for stage in planned["stages"]]
    assert "planned: CoM-micro-" in shown.err


def family(**allocation: Any) -> dict[str, Any]:
    return VITS | {"allocation": allocation}


REFUSED: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "budget": (family(budget="5 %"), [], ["allocation.budget", "cheapest chain is", "% of the baseline"]),
    "ratios": (family(ratios=[5, 6]), [], ["allocation.ratios", "the nearest is"]),
    "one model": (VITS | {"family": "CoM-ViT-T-16"}, [], ["family", "at least two models"]),
    "unknown model": (VITS | {"family": ["CoM-ViT-T-16", "CoM-ViT-Z-16"]}, [], ["family", "did you mean CoM-ViT-"]),
    "no match": (VITS | {"family": "CoM-Vit-*-16"}, [], ["family", "fits no model name"]),
    "open brace": (VITS | {"family": "CoM-ViT-{T,S-16"}, [], ["family", "CoM-ViT-{T,S-16"]),
    "zero epochs": (MICRO, ["--set", "chain.1.epochs=0"], ["chain.1.epochs", "above zero"]),
    "less than a step": (MICRO, ["--set", "chain.1.epochs=1 sample"], ["chain.1.epochs", "one optimiser step"]),
    "unknown in chain": (MICRO, ["--set", "chain.1.model=CoM-micro-X"], ["chain.1.model", "did you mean CoM-micro-"]),
    "shrinking": (MICRO, ["--set", "chain.0.model=CoM-micro-L"], ["chain.1.model", "from small to large"]),
    "image size": (MICRO, ["--set", "data.image_size=41"], ["data.image_size", "41"]),
    "teacher's image size": (
        MICRO
        | {
            "chain": [
                {"model": "CoM-Swin-T", "epochs": 9},
                {"model": "CoM-ViT-L-16", "epochs": 3, "data": {"image_size": 256}},
            ]
        },
        ["--set", "transfer.width=none"],
        ["chain.1.model", "CoM-Swin-T → CoM-ViT-L-16", "256 pixels", "224 pixels"],
    ),
    "nothing to shrink": (
        MICRO,
        ["--set", "transfer.width=none", "--set", "transfer.shrink=0.2"],
        ["transfer.shrink", "0.2", "1 with width: none"],
    ),
    "shrunk moments": (
        MICRO,
        ["--set", "transfer.optimizer=grow", "--set", "transfer.shrink=0.2"],
        ["transfer.shrink", "0.2", "1 with optimizer: grow"],
    ),
    "rules": (family(first=20, rules=[[24, 14]]), [], ["allocation.rules", "allocation.first"]),
    "two rates": (MICRO, ["--tflops", "1", "--throughput", "1,2"], ["one of them"]),
    "rates": (MICRO, ["--throughput", "100"], ["--throughput", "CoM-micro-S, CoM-micro-M"]),
    "no numbers": (MICRO, ["--throughput", "fast"], ["--throughput", "above zero"]),
    "no run": (MICRO, ["--like", "nowhere/run"], ["--like", "nowhere/run"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_one_message_with_status_2(command: Any, case: str) -> None:
    tree, arguments, expected = REFUSED[case]
    code, out, message = command(tree, *arguments)
    assert (code, out) == (2, ""), message
    for part in ("given", "allowed", "fix", *expected):
        assert part in message
    assert "Traceback" not in message


def test_a_breach_of_a_principle_is_a_warning(command: Any) -> None:
    chain = [{"model": f"CoM-ViT-{size}-16", "epochs": n} for size, n in (("T", 128), ("B", 10), ("L", 12))]
    code, out, _ = command({key: VITS[key] for key in ("name", "data")} | {"chain": chain})
    flat = " ".join(out.split())
    assert code == 0
    assert "warning: CoM-ViT-T-16 → CoM-ViT-B-16 expands 15.3 times, above 4: put CoM-ViT-S-16 in between" in flat
    assert "warning: stage 3 trains for 12 epochs after 10" in flat


def test_finished_runs_predict_accuracy_and_speed(command: Any, tmp_path: Path) -> None:
    config = json.loads(validate(MICRO | {"storage": str(tmp_path / "runs")}).model_dump_json())
    for i in range(4):
        stages = [
            {"index": 0, "model": "CoM-micro-S", "key": f"s{i}", "status": "trained", "macs": 1e12 * (i + 1)},
            {"index": 1, "model": "CoM-micro-M", "key": f"m{i}", "status": "trained", "macs": 1e12 * (i + 1)}
            | {"metrics": {"zero_shot_top1": 30.0 + 5 * i}, "wall_s": 100.0, "samples_seen": 48_000},
        ]
        folder = tmp_path / "runs" / f"run{i}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"config": config, "stages": stages}))
        code, out, _ = command(MICRO)
        assert code == 0
        if i < 2:
            assert "no prediction for CoM-micro-M grown" in out
    assert "zero-shot top-1 of CoM-micro-M: about 3" in out
    assert "from 4 of your finished stages" in " ".join(out.split())
    plan = json.loads(command(MICRO, "--like", str(tmp_path / "runs" / "run0"), "--json")[1])
    assert plan["time"]["hours"][1] == pytest.approx(100 / 3600, rel=1e-2)
    assert plan["prediction"]["low"] < plan["prediction"]["value"] < plan["prediction"]["high"]


def test_nothing_finished_means_no_prediction(command: Any) -> None:
    assert "prediction" not in json.loads(command(MICRO, "--json")[1])


def test_a_table_without_colour_reads_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    plan_table(raychain.plan(validate(MICRO)))
    assert "\x1b" not in capsys.readouterr().out


def test_an_experiment_without_a_chain_says_so() -> None:
    with pytest.raises(InputError, match="or `family:`"):
        validate({"name": "x", "data": {"train": "x"}})


def test_a_chain_that_costs_as_much_as_its_last_model_alone_is_said() -> None:
    dear = MICRO | {"chain": [{"model": "CoM-micro-S", "epochs": 12}, {"model": "CoM-micro-M", "epochs": 12}]}
    cheap = MICRO | {"chain": [{"model": "CoM-micro-S", "epochs": 12}, {"model": "CoM-micro-L", "epochs": 2}]}
    assert "no less than CoM-micro-M alone for 12 epochs" in raychain.plan(validate(dear))["notes"][0]
    assert raychain.plan(validate(cheap))["notes"] == []


@pytest.mark.parametrize(
    ("epochs", "transfer", "said"),
    [
        (64, {}, ["weights that are not shrunk cost 2 to 7 points"]),
        (64, {"shrink": 0.2}, []),
        (64, {"shrink": 0.2, "distill": None}, ["without distillation"]),
        (8, {"shrink": 0.2}, ["shrunk weights were measured from 32 epochs on alone"]),
        (8, {}, []),
        (64, {"width": "none"}, []),
    ],
)
def test_a_plan_says_what_was_measured_in_its_case(epochs: int, transfer: Any, said: list[str]) -> None:
    chain = [{"model": "CoM-micro-M", "epochs": epochs}, {"model": "CoM-micro-L", "epochs": 4}]
    small = MICRO | {"chain": chain, "transfer": transfer, "data": {"train": "x.tar", "samples": 1000}}
    notes = raychain.plan(validate(small))["notes"]
    assert len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes, strict=True))
    large = small | {"data": {"train": "x.tar", "samples": 2_000_000}, "train": {"global_batch": 1024}}
    assert raychain.plan(validate(large))["notes"] == []
