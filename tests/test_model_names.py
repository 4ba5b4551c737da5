"""Every name of open_clip's and timm's is usable or refused with one message; the sweep in experiments tries all."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from raychain.config.loading import validate
from raychain.errors import InputError
from raychain.models import at_image_size, build, model_config
from raychain.models.registry import matching_models
from raychain.runs.checks import check_chain

USABLE = [
    "RN50",
    "RN50x4-quickgelu",
    "ViT-S-32-alt",
    "ViTamin-S",
    "ViTamin-XL-384",
    "EVA02-B-16",
    "MobileCLIP-S1",
    "convnext_tiny",
    "convnext_base_w_320",
    "PE-Core-T-16-384",
    "resnet18",
    "resnet26d",
    "test_resnet",
    "test_vit",
    "test_efficientnet",
    "naflexvit_base_patch16_gap",
    "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224",
    "efficientvim_m1_dist",
]
REFUSED = {
    "coca_ViT-B-32": "CoCa",
    "nllb-clip-base": "Hugging Face text tower",
    "xlm-roberta-base-ViT-B-32": "Hugging Face text tower",
    "ViT-B-16-SigLIP2": "Hugging Face tokenizer",
    "ViT-H-14-worldwide": "Hugging Face tokenizer",
    "efficientvit_b0": "image tower cannot be run",
    "qwen3_vit_88m_enc": "reset_classifier",
    "vit_tiny_patch16_225": "Did you mean",
    "resnet18.a1_in1k": "Did you mean",
    "hf-hub:someone/model": "address of weights",
    "../models/mine": "unknown model",
    "x" * 5000: "unknown model",
}


def chain(*models: str, **keys: Any) -> Any:
    stages = [{"model": model, "epochs": 1} for model in models]
    return validate({"name": "names", "data": {"train": "none.tar"}, "chain": stages, **keys})


@pytest.fixture(scope="module")
def sweep() -> Any:
    path = Path(__file__).parents[1] / "experiments/models/sweep.py"
    spec = importlib.util.spec_from_file_location("sweep", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sweep_knows_every_name_and_what_a_fault_is(sweep, tmp_path, monkeypatch, capsys) -> None:
    assert {"RN50", "CoM-ViT-T-16", "resnet18"} <= set(sweep.names())
    assert len(sweep.names()) > 1000
    assert sweep.main(["CoM-micro-?", "coca_ViT-B-32", "--out", str(tmp_path / "table.json")]) == 0
    assert "refused coca_ViT-B-32" in capsys.readouterr().out
    assert '"usable": 4' in (tmp_path / "table.json").read_text()

    def prints(_: object) -> None:
        print("hello")

    monkeypatch.setattr(sweep, "check_chain", prints)
    assert sweep.try_name("RN50").outcome == "fault"
    monkeypatch.setattr(sweep, "check_chain", lambda _: sweep.socket.getaddrinfo("localhost", 80))
    assert "connection" in sweep.try_name("RN50").message


@pytest.mark.parametrize("name", USABLE)
def test_usable_names(name: str, sweep: Any) -> None:
    assert sweep.try_name(name)[1:3] == ("usable", "")


@pytest.mark.parametrize("name", REFUSED, ids=lambda name: name[:40])
def test_refused_names_are_one_message(name: str, sweep: Any) -> None:
    _, outcome, message, seconds = sweep.try_name(name)
    assert (outcome, REFUSED[name] in message) == ("refused", True), message
    assert message.startswith("chain.0.model")
    assert len(message) < 1500
    assert seconds < 60


@pytest.mark.parametrize(
    ("models", "keys", "says"),
    [
        (["resnet18"], {"data": {"train": "none.tar", "image_size": 8192}}, None),
        (["CoM-micro-S"], {"data": {"train": "none.tar", "image_size": 44}}, "data.image_size"),
        (["vit_tiny_patch16_224"], {"data": {"train": "none.tar", "image_size": 256}}, "data.image_size"),
        (["RN50"], {"data": {"train": "none.tar", "image_size": 16}}, "data.image_size"),
        (["CoM-micro-S"], {"baseline": {"model": "CoM-micro-X", "epochs": 1}}, "baseline.model"),
        (["CoM-micro-S"], {"baseline": {"model": "swin_tiny_patch4_window7_224", "epochs": 1}}, "data.image_size"),
    ],
)
def test_sizes_and_baselines_that_do_not_fit_are_said_where_they_stand(models, keys, says) -> None:
    if says is None:
        check_chain(chain(*models, **keys))
        return
    with pytest.raises(InputError) as caught:
        check_chain(chain(*models, **keys))
    assert caught.value.args[0] == says
    assert len(str(caught.value)) < 1500


def test_a_teacher_whose_position_embeddings_cannot_be_interpolated_is_refused_before_anything_starts() -> None:
    """open_clip interpolates those of its own ViTs alone; a ResNet's attention pool has some too."""
    two = chain("RN50", "RN50x4", transfer={"width": "none", "depth": "identity"})
    with pytest.raises(InputError, match="cannot be brought to 288 pixels"):
        check_chain(two)
    with pytest.raises(ValueError, match="cannot be brought to 256 pixels"):
        at_image_size(build("RN50", seed=0, device="meta"), model_config("RN50"), 256)


def test_patterns_that_stand_for_endless_names_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 10,000 names"):
        matching_models(["CoM-{1..1000000000}"])


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_every_parameter_of_a_usable_model_gets_a_gradient_in_training(name: str) -> None:
    """DistributedDataParallel waits for them all."""
    model = build(name, seed=0).train()
    size = model_config(name)["vision_cfg"]["image_size"]
    features = model.encode_image(torch.randn(3, 3, size, size)) + model.encode_text(torch.randint(1, 400, (3, 77)))
    features.square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == ["logit_scale"]
