"""Each tower as an ONNX file: normalised pictures, or token ids, to features of length 1."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raychain.exporting.source import RefusedError, Source, compared

IMAGE, TEXT = "image.onnx", "text.onnx"


class _Image(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.model.encode_image(pixel_values), dim=-1)


class _Text(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.model.encode_text(input_ids), dim=-1)


def to_onnx(source: Source, folder: Path) -> dict[str, float]:
    """Writes `image.onnx` and `text.onnx`, with any number of samples a call, runs them in onnxruntime and compares.

    `config.json` says how pictures are prepared. Raises RefusedError for what ONNX has no words for.
    """
    import onnxruntime

    wanted = source.encode()
    inputs = {"pixel_values": source.pictures(), "input_ids": source.tokens()}
    found = {}
    for name, tower, (key, value), features in zip(
        (IMAGE, TEXT), (_Image(source.model), _Text(source.model)), inputs.items(), wanted, strict=True
    ):
        _write(tower.eval(), value, key, folder / name)
        session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        three = torch.cat([value, value[:1]])  # another number of samples than it was made with
        [given] = session.run(None, {key: three.numpy()})
        expected = nn.functional.normalize(torch.cat([features, features[:1]]), dim=-1)
        what = f"{name.removesuffix('.onnx')} features"
        found[what] = compared(torch.from_numpy(given), expected, what)
    preprocessing = {k: source.preprocessing[k] for k in ("mean", "std", "interpolation") if k in source.preprocessing}
    document = {"image_size": list(source.pixels), **preprocessing, "context_length": inputs["input_ids"].shape[1]}
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n")
    return found


def _write(tower: nn.Module, example: torch.Tensor, key: str, path: Path) -> None:
    said, log = io.StringIO(), logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                tower, (example,), path, input_names=[key], output_names=["features"], dynamo=True, external_data=False,
                dynamic_shapes=({0: torch.export.Dim("samples", min=1, max=65536)},),
            )  # fmt: skip
    except Exception as error:  # the exporter has many kinds of its own
        line = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise RefusedError(f"torch cannot export it: {type(error).__name__} {line}") from None
    finally:
        log.setLevel(level)
