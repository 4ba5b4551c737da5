"""`raychain export`: unmodified libraries load what is written, and their outputs are equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import raychain
from raychain.cli import app
from raychain.errors import InputError
from raychain.models import build, model_config
from raychain.models.tokenizing import make_tokenizer
from raychain.paradigms import make_paradigm
from raychain.paradigms.task import Task

TEXTS = ["a red thing", "two blue things on a table"]
CARD = "---\nlicense: mit\nlibrary_name: open_clip\n---\n\n# a card\n\n## Use\n\nopen_clip\n\n## How it was trained\n"


def stage(folder: Path, name: str = "CoM-micro-S") -> tuple[Path, Any]:
    """A stage folder of a model whose parameters are all random, with a card."""
    model, config = build(name, seed=1), model_config(name)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    folder.mkdir(parents=True)
    make_paradigm(Task()).save(folder, model, config, model.visual.image_size)
    (folder / "README.md").write_text(CARD)
    return folder, model.eval()


def pictures(size: int) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(3))


def equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_timm_loads_the_image_tower(tmp_path: Path) -> None:
    import timm

    folder, model = stage(tmp_path / "stage")
    exported = raychain.export(folder, "timm", tmp_path / "out")
    assert exported.differences["image features"] < 1e-4
    found = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.inference_mode():
        equal(found(pictures(40)), model.encode_image(pictures(40)))
    assert tuple(found.pretrained_cfg["mean"]) == tuple(model.visual.preprocess_cfg["mean"])
    card = (tmp_path / "out/README.md").read_text()
    assert "library_name: timm" in card
    assert "timm.create_model" in card
    assert "license: mit" in card


def test_timm_loads_a_tower_that_is_its_own(tmp_path: Path) -> None:
    import timm

    folder, model = stage(tmp_path / "stage", "vit_tiny_patch16_224")
    raychain.export(folder, "timm", tmp_path / "out")
    found = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.inference_mode():
        equal(found(pictures(224)), model.encode_image(pictures(224)))


def test_transformers_load_both_towers_and_the_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    folder, model = stage(tmp_path / "stage")
    raychain.export(folder, "transformers", tmp_path / "out")
    found = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS, padding=True, return_tensors="pt")
    mine = torch.from_numpy(make_tokenizer(model_config("CoM-micro-S"))(TEXTS)).long()
    with torch.inference_mode():
        out = found(**tokens, pixel_values=pictures(40))
        equal(out.image_embeds, model.encode_image(pictures(40), normalize=True))
        equal(out.text_embeds, model.encode_text(mine, normalize=True))
        equal(found.logit_scale, model.logit_scale)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(Image.new("RGB", (80, 60), "red"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 40, 40)
    red = (1 - model.visual.preprocess_cfg["mean"][0]) / model.visual.preprocess_cfg["std"][0]
    assert float(pixels[0, 0].mean()) == pytest.approx(red, rel=1e-3)


def test_onnxruntime_runs_both_towers(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    folder, model = stage(tmp_path / "stage")
    raychain.export(folder, "onnx", tmp_path / "out")
    mine = torch.from_numpy(make_tokenizer(model_config("CoM-micro-S"))(TEXTS)).long()
    image, text = (onnxruntime.InferenceSession(tmp_path / f"out/{name}.onnx") for name in ("image", "text"))
    with torch.inference_mode():
        wanted = model.encode_image(pictures(40), normalize=True), model.encode_text(mine, normalize=True)
    equal(torch.from_numpy(image.run(None, {"pixel_values": pictures(40).numpy()})[0]), wanted[0])
    equal(torch.from_numpy(text.run(None, {"input_ids": mine.numpy()})[0]), wanted[1])
    assert json.loads((tmp_path / "out/config.json").read_text())["image_size"] == [40, 40]


def test_open_clip_loads_the_command_s_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import open_clip

    folder, model = stage(tmp_path / "stage")
    with pytest.raises(SystemExit) as stop:
        app(["export", str(folder), "--to", "open_clip", "--out", str(tmp_path / "out"), "--json"])
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out)["to"] == "open_clip"
    found, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    with torch.inference_mode():
        equal(found.eval().encode_image(pictures(40)), model.encode_image(pictures(40)))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "open_clip_config.json", "open_clip_model.safetensors",
    }  # fmt: skip


def test_what_has_no_equal_is_refused(tmp_path: Path) -> None:
    folder, _ = stage(tmp_path / "swin", "CoM-micro-Swin")
    for to in ("timm", "transformers"):
        if to == "transformers":
            pytest.importorskip("transformers")
        with pytest.raises(InputError, match="has an equal"):
            raychain.export(folder, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="did you mean timm"):
        raychain.export(folder, "tim", tmp_path / "out")
    with pytest.raises(InputError, match="new or empty"):
        raychain.export(folder, "open_clip", folder)
    with pytest.raises(InputError, match="STAGE"):
        raychain.export(tmp_path, "open_clip", tmp_path / "out")
