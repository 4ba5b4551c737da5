"""`raychain.export`: a stage as another library loads it, compared with the original before it is kept."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from raychain.core.storage import Folder, local_path
from raychain.errors import InputError, nearest
from raychain.exporting.source import RefusedError, Source
from raychain.models.checkpoints import CONFIG, CheckpointError, read_checkpoint
from raychain.models.configs import ConfigError, read_json
from raychain.models.registry import UnknownModelError
from raychain.models.remote import FORMS, local_checkpoint, stages_in
from raychain.pages.card import CARD, of_library

NEEDED = {"transformers": ("transformers",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
"""Packages beyond raychain's own."""


class Exported(NamedTuple):
    """What was written, and how far its outputs are from the original's."""

    folder: Path
    differences: dict[str, float]
    """The largest difference of each output, relative to the largest number in it."""


def export(stage: str | Path, to: str, out: str | Path) -> Exported:
    """Writes the stage (or another open_clip checkpoint) to the new folder `out` as the library `to` loads it.

    `to` is `open_clip` (both towers), `timm` (the image tower; its classifier is the projection), `transformers` (a
    CLIPModel with tokenizer and image processor) or `onnx` (a file a tower). The library loads the folder back, and its
    outputs are compared with the original's; what would not be equal is refused.

    Raises InputError before anything is written, also where the library has no equal of the model.
    """
    if to not in FORMATS:
        raise InputError("--to", to, ", ".join(FORMATS), nearest(to, list(FORMATS), "name one of these"))
    if lacking := [name for name in NEEDED.get(to, ()) if find_spec(name) is None]:
        raise InputError("--to", to, f"with {', '.join(lacking)} installed", "pip install 'raychain[export]'")
    folder = _new_folder(out)
    with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
        made, copied = Path(scratch, "made"), Path(scratch, "copied")
        made.mkdir()
        copied.mkdir()
        source = _read(str(stage), copied)
        try:
            differences = FORMATS[to](source, made)
        except RefusedError as error:
            raise InputError("--to", to, "a library that has an equal of the model", str(error)) from None
        _add_card(str(stage), to, made)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(made, folder, dirs_exist_ok=True)
        except OSError as error:
            raise InputError("--out", folder, "a folder that can be written", str(error)) from None
    return Exported(folder, differences)


def _open_clip(source: Source, folder: Path) -> dict[str, float]:
    """open_clip's own folder, without what raychain keeps beside it."""
    import open_clip
    import torch

    from raychain.exporting.source import compared
    from raychain.paradigms import make_paradigm
    from raychain.paradigms.task import Task

    make_paradigm(Task()).save(folder, source.model, source.config, source.pixels[0])
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.inference_mode():
        found = again.eval().encode_image(source.pictures()), again.encode_text(source.tokens())
    names = ("image features", "text features")
    return {name: compared(own, wanted, name) for name, own, wanted in zip(names, found, source.encode(), strict=True)}


def _timm(source: Source, folder: Path) -> dict[str, float]:
    from raychain.exporting.to_timm import to_timm

    return to_timm(source, folder)


def _transformers(source: Source, folder: Path) -> dict[str, float]:
    from raychain.exporting.to_transformers import to_transformers

    return to_transformers(source, folder)


def _onnx(source: Source, folder: Path) -> dict[str, float]:
    from raychain.exporting.to_onnx import to_onnx

    return to_onnx(source, folder)


FORMATS: dict[str, Callable[[Source, Path], dict[str, float]]] = {
    "open_clip": _open_clip,
    "timm": _timm,
    "transformers": _transformers,
    "onnx": _onnx,
}


def _read(stage: str, scratch: Path) -> Source:
    try:
        path = local_checkpoint(stage, scratch)
        if path.is_dir() and not (path / CONFIG).is_file():
            what = stages_in(stage) or _own_library(path) or f"there is no {CONFIG} in it"
            raise InputError("STAGE", stage, "a stage of two towers, or another folder of open_clip's", what)
        found = read_checkpoint(path)
    except (CheckpointError, UnknownModelError) as error:
        raise InputError("STAGE", stage, FORMS, str(error)) from None
    return Source(found.model.eval(), found.config)


def _own_library(folder: Path) -> str:
    """What loads a folder that needs no export; empty where it is no such folder."""
    try:
        found = read_json(folder / "config.json")
    except ConfigError:
        return ""
    if isinstance(found, dict) and "architecture" in found:
        return "it is a timm model's folder: timm.create_model('local-dir:FOLDER', pretrained=True) loads it as it is"
    if isinstance(found, dict) and "model_type" in found:
        return "it is a folder of transformers', whose from_pretrained loads it as it is"
    return ""


def _add_card(stage: str, to: str, folder: Path) -> None:
    """The stage's card, where it has one, with how the library loads the folder."""
    try:
        card = Folder(stage).read(CARD)
    except (OSError, InputError):
        return
    if card is not None:
        (folder / CARD).write_text(of_library(card.decode(errors="replace"), to), encoding="utf-8")


def _new_folder(out: str | Path) -> Path:
    folder = local_path(out, "--out")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError("--out", out, "a new or empty folder", "give another one")
    except OSError as error:
        raise InputError("--out", out, "a folder that can be written", str(error)) from None
    return folder
