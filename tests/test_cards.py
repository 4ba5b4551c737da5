"""The model card in every stage's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_report import run_json

from raychain.core.storage import Folder
from raychain.pages.card import CARD, MARK, card, leave_card, leave_cards, of_library
from raychain.records import RunRecord

ROOT = Path(__file__).parents[1]


def front(text: str) -> Any:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def made(**changes: Any) -> str:
    run = RunRecord.of(run_json(**changes))
    assert run.stages
    return card(run, run.stages[1])


def test_a_card_says_data_chain_recipe_and_metrics() -> None:
    text = made()
    head = front(text)
    assert head["license"] == "unknown"
    assert (head["library_name"], head["pipeline_tag"]) == ("open_clip", "zero-shot-image-classification")
    measured = {r["metrics"][0]["type"]: r["metrics"][0]["value"] for r in head["model-index"][0]["results"]}
    assert measured == {"top1": 30.0, "i2t_r1": 40.0, "t2i_r1": 15.0}
    for said in ("| CoM-micro-S | 2 | 6,400 | 1.00 T |", "this one", "global_batch: 64", "3,200 usable samples",
                 "| zero-shot top-1 | 30.0 % |", "Stage 2 of 2", "open_clip.create_model_and_transforms"):  # fmt: skip
        assert said in text, said
    assert "hunter2" not in text


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("apache-2.0", {"license": "apache-2.0"}), ("Ours: v1", {"license": "other", "license_name": "Ours: v1"})],
)
def test_the_licence_is_the_experiments(given: str, wanted: dict[str, str]) -> None:
    config = run_json()["config"] | {"license": given}
    head = front(made(config=config))
    assert {key: value for key, value in head.items() if key.startswith("license")} == wanted


def test_the_hubs_own_library_reads_the_metadata() -> None:
    hub = pytest.importorskip("huggingface_hub")
    found = hub.ModelCard(made()).data
    assert found.license == "unknown"
    assert found.library_name == "open_clip"
    assert [result.metric_value for result in found.eval_results] == [30.0, 40.0, 15.0]


def test_names_from_files_are_no_markup() -> None:
    stages = run_json()["stages"]
    stages[0]["model"] = "a | <script> `b`\n---\n# c"
    text = made(stages=stages, name="<b>\n# x")
    assert "<script>" not in text
    assert "\n# c" not in text
    assert "\n# x" not in text
    assert front(text)["license"] == "unknown"


def test_a_card_is_kept_once_somebody_has_made_it_his_own(tmp_path: Path) -> None:
    run = RunRecord.of(run_json())
    assert run.stages
    stage = run.stages[1].model_copy(update={"checkpoint": "stages/1"})
    (tmp_path / "stages/1").mkdir(parents=True)
    path = tmp_path / "stages/1" / CARD
    leave_card(Folder(str(tmp_path)), run, stage)
    assert MARK in path.read_text()
    path.write_text(path.read_text().replace(MARK, "") + "mine\n")
    leave_card(Folder(str(tmp_path)), run, stage)
    assert path.read_text().endswith("mine\n")
    leave_cards(Folder(str(tmp_path / "nothing")))


def test_a_card_follows_its_export() -> None:
    text = of_library(made(), "timm")
    assert front(text)["library_name"] == "timm"
    assert "timm.create_model" in text
    assert "open_clip.create" not in text
    assert "| zero-shot top-1 | 30.0 % |" in text
    assert of_library("# mine\n", "timm") == "# mine\n"


def test_a_runs_stages_have_cards_that_say_what_was_measured(
    finished: tuple[dict[str, Any], Path, dict[str, Any]],
) -> None:
    run, out, _ = finished
    for stage in run["stages"]:
        folder = out / stage["checkpoint"]
        text = (folder / CARD).read_text()
        assert stage["model"] in text
        assert front(text)["model-index"][0]["results"]
        record = json.loads((folder / "stage.json").read_text())
        assert CARD not in record["files"], "a card changes when metrics come, and is no part of the stage"


def test_a_stage_folder_is_what_open_clip_pushes(
    finished: tuple[dict[str, Any], Path, dict[str, Any]], tmp_path: Path
) -> None:
    import open_clip
    from open_clip.push_to_hf_hub import save_for_hf
    from safetensors.torch import load_file

    run, out, _ = finished
    folder = out / run["stages"][0]["checkpoint"]
    document = json.loads((folder / "open_clip_config.json").read_text())
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    if not hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained = lambda _: None
    save_for_hf(model, tokenizer, document["model_cfg"], str(tmp_path / "pushed"), safe_serialization=True)
    pushed = json.loads((tmp_path / "pushed/open_clip_config.json").read_text())
    assert pushed["model_cfg"] == document["model_cfg"]
    assert {k: v for k, v in pushed["preprocess_cfg"].items() if k in ("mean", "std")} == {
        k: document["preprocess_cfg"][k] for k in ("mean", "std")
    }
    [weights] = (tmp_path / "pushed").glob("*.safetensors")
    assert weights.name == "open_clip_model.safetensors"
    ours, theirs = load_file(folder / weights.name), load_file(weights)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
