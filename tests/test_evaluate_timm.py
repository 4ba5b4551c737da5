"""`raychain evaluate` of plain timm models: the features of timm's own evaluation, and a linear probe on them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from safetensors.torch import save_file

import raychain
from raychain.data.cache import ShardCache
from raychain.data.decode import resize_exactly
from raychain.data.spec import Resizing, squared
from raychain.errors import InputError
from raychain.evaluators.builtin import LinearProbe
from raychain.evaluators.context import Context
from raychain.evaluators.evaluator import Setting
from raychain.evaluators.subject import read_subject

MODELS = {
    "vit_tiny_patch16_224": {"img_size": 48},
    "swin_tiny_patch4_window7_224": {"img_size": 56},
    "resnet18": {},
}
SEEN = {"crop_pct": 0.9, "interpolation": "bilinear", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25],
        "input_size": [3, 64, 64]}  # fmt: skip


def saved(folder: Path, name: str, **seen: Any) -> Path:
    """The folder of a model with random weights, as timm saves it."""
    torch.manual_seed(0)
    folder.mkdir()
    model = timm.create_model(name, num_classes=7, **MODELS[name])
    timm.models.save_for_hf(model, folder, model_args=MODELS[name])
    document = json.loads((folder / "config.json").read_text())
    document["pretrained_cfg"] |= SEEN | seen
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(61, 47), (47, 90), (40, 40), (33, 21)])
@pytest.mark.parametrize("crop", [0.875, 0.95, 1.0])
def test_pictures_are_to_the_bit_those_of_timm(mode: str, kernel: Any, shape: tuple[int, int], crop: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    theirs = timm.data.create_transform(
        (3, 40, 40), interpolation=kernel, crop_pct=crop, crop_mode=mode, mean=(0, 0, 0), std=(1, 1, 1)
    )(Image.open(content))
    ours = resize_exactly(content.getvalue(), 40, Resizing(mode == "squash", kernel, crop))
    assert np.array_equal(ours, (theirs.permute(1, 2, 0) * 255).round().byte().numpy())


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_that_timms_classifier_gets(name: str, demo: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", name)
    subject = read_subject(str(folder), None)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(MODELS[name], model=model))
    tar = next((demo / "zero_shot" / "test" / "test").glob("*.tar"))
    samples = [s for s, _ in zip(webdataset.WebDataset(str(tar), shardshuffle=False), range(5), strict=False)]
    images = torch.stack([transform(Image.open(io.BytesIO(s["jpg"])).convert("RGB")) for s in samples])
    with torch.inference_mode():
        expected = F.normalize(model.forward_head(model.forward_features(images), pre_logits=True), dim=-1)
    context = Context(
        ShardCache(tmp_path / "cache", 1 << 30), None, subject.image_size, subject.mean, subject.std,
        torch.device("cpu"), resizing=subject.resizing,
    )  # fmt: skip
    probe = LinearProbe(type="linear_probe", data=(str(tar),), train=(str(tar),))
    (tmp_path / "counts").mkdir()
    data: Any = probe.resolve("evaluators.probe", Setting(tmp_path, ()))
    with torch.inference_mode():
        encoder = context.encoder(subject.model.eval())
        table, _ = next(iter(encoder.tables(data.test, data.wanted)))
        found = encoder.images(table, range(5))
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_linear_probe_measures_a_timm_model_and_what_needs_texts_refuses_it(demo: Path, tmp_path: Path) -> None:
    folder, cache = saved(tmp_path / "model", "vit_tiny_patch16_224"), str(tmp_path / "cache")
    shards = str(demo / "zero_shot" / "test" / "test")
    probe = {"probe": {"type": "linear_probe", "data": shards, "train": shards}}
    found = raychain.evaluate(str(folder), evaluators=probe, cache=cache)
    assert (found["image_size"], found["results"]) == (48, [])
    assert 30 < found["metrics"]["probe/top1"] <= 100, "fitted on the pictures that it is tested on"
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict(), weights)
    with pytest.raises(InputError, match=r"(?s)CHECKPOINT.*pos_embed has shape"):
        raychain.evaluate(str(weights), evaluators=probe, model="vit_tiny_patch16_224", cache=cache)
    with pytest.raises(InputError, match=r"(?s)evaluators.z.type.*linear_probe.*no texts"):
        raychain.evaluate(str(folder), evaluators={"z": {"type": "zero_shot", "data": shards}}, cache=cache)
    with pytest.raises(InputError, match=r"(?s)--data.*takes no texts"):
        raychain.evaluate(str(folder), shards, cache=cache)


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ({"crop_mode": "border"}, "resize_mode border"),
        ({"interpolation": "lanczos"}, "lanczos"),
        ({"crop_pct": "much"}, "pretrained_cfg.crop_pct"),
        ({"crop_pct": 1.5}, "crop_pct 1.5"),
        ({"mean": [0.5]}, "pretrained_cfg.mean"),
    ],
)
def test_what_cannot_be_prepared_as_timm_does_is_refused(seen: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"(?s)CHECKPOINT.*{said}"):
        read_subject(str(saved(tmp_path / "model", "vit_tiny_patch16_224", **seen)), None)


def test_a_weights_file_is_prepared_as_its_architecture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=3)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    subject = read_subject(str(tmp_path / "w.safetensors"), "deit_tiny_patch16_224")
    assert (subject.image_size, subject.takes, subject.tokenize) == (224, {"pictures", "classes"}, None)
    assert subject.resizing == Resizing(crop=model.pretrained_cfg["crop_pct"])
    assert subject.mean == pytest.approx(model.pretrained_cfg["mean"])
    assert Resizing().digest == "Resizing(squash=False, kernel='bicubic')", "names of cached files stay"
    assert squared({"size": 40})[1].digest == Resizing().digest != subject.resizing.digest
