"""Classification as a paradigm: timm's models on pictures with a class each, in timm's folders."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from raychain.core.storage import Folder, below, is_command
from raychain.data.index import folder_of
from raychain.data.members import Wanted
from raychain.data.shards import Shard, survey
from raychain.data.spec import STORED_BEYOND_CROP, Resizing, Spec, fitting
from raychain.errors import InputError
from raychain.models.checkpoints import CheckpointError
from raychain.models.timm_checkpoints import CONFIG, WEIGHTS, TimmCheckpoint, is_timm, read_timm, write_timm
from raychain.paradigms.base import Config, Paradigm, Read
from raychain.paradigms.classify.augment import Changes
from raychain.paradigms.classify.mixing import Mixing
from raychain.paradigms.classify.models import OWN, build, configuration, known, options_of, width_of
from raychain.paradigms.classify.objective import ClassifyObjective
from raychain.paradigms.classify.reader import ClassReader
from raychain.paradigms.classify.task import ClassifyTask
from raychain.paradigms.objective import Objective, Projector

if TYPE_CHECKING:
    from raychain.config.data import Data
    from raychain.planning.macs import ModelSize

CLASSNAMES = "classnames.txt"
MOST_BEYOND = 2.0
"""Shorter side of the pictures that are kept for small crops, as a multiple of the crop's output."""


class Classify(Paradigm):
    """Supervised classification."""

    name = "classify"
    options = ClassifyTask
    samples = "pictures"
    takes = frozenset({"pictures", "classes"})
    files = (CONFIG, WEIGHTS)
    library, pipeline = "timm", "image-classification"
    task: ClassifyTask

    @property
    def classes(self) -> int:
        return self.task.classes

    def known(self) -> Sequence[str]:
        return known()

    def config(self, model: str) -> Config:
        return configuration(model, self.task.classes, self.task.drops(model))

    def native_size(self, config: Config) -> int:
        return int(config["image_size"])

    def build(self, config: Config, *, size: int, seed: int, device: str | torch.device = "cpu") -> nn.Module:
        return build(config, size, seed=seed, device=device)

    def adapt(self, model: nn.Module, config: Config, size: int) -> nn.Module:
        """The model with position embeddings interpolated as timm does, where it has a size of its own."""
        given: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
        if not config["sized"] or given is None or given[0] == size:
            return model
        resized: Any = copy.deepcopy(model)
        windows = {stage.blocks[0].window_size for stage in getattr(resized, "layers", ())}
        window = {"window_size": max(windows)} if windows else {}  # Swin's windows stay as large as they are
        resized.set_input_size(img_size=(size, size), **window)
        return cast(nn.Module, resized)

    def objective(self, model: nn.Module, config: Config, teacher: Config | None = None) -> Objective:
        sizes = {"pooled": (width_of(config), width_of(teacher))} if teacher is not None else {}
        projector = Projector(sizes) if teacher is not None else None
        return ClassifyObjective(model, self.task, config["mean"], config["std"], projector)

    def survey(self, addresses: Sequence[str], data: Data, cache: Path, where: str) -> list[Shard]:
        self._check_names(addresses, where)
        self._check_device(data)
        return survey(addresses, Wanted(label=True, key_split=data.key_split), cache, where)

    def _check_device(self, data: Data) -> None:
        """InputError where pictures are finished on the GPU, and something would have to change them after that."""
        changes = ("augment", "color_jitter", "erase", "mixup", "cutmix")
        if data.augment_on == "device" and (later := [f"task.{name}" for name in changes if getattr(self.task, name)]):
            allowed = f"host with {', '.join(later)}, which the processor does to finished pictures"
            raise InputError("data.augment_on", "device", allowed, "leave data.augment_on out, or those")

    def _check_names(self, addresses: Sequence[str], where: str) -> None:
        """InputError where `classnames.txt` beside the first shard, or above it, has other than `classes` lines."""
        if is_command(addresses[0]):
            return
        folder = folder_of(addresses[0])
        for address in (folder, folder_of(folder)):
            try:
                content = Folder(address).read(CLASSNAMES)
            except (OSError, ValueError, InputError):  # a folder that cannot be looked into has no say
                content = None
            if content is not None and (lines := len(content.strip().splitlines())) != self.task.classes:
                allowed = f"{lines}, the lines of {below(address, CLASSNAMES)}"
                fix = f"--set task.classes={lines}, or correct {where}"
                raise InputError("task.classes", self.task.classes, allowed, fix)

    def reader(self, data: Data, config: Config, size: int, samples: int) -> ClassReader:  # noqa: ARG002
        """Where small crops are asked for, larger pictures are kept than for crops that show nearly all."""
        wanted = Wanted(label=True, key_split=data.key_split, below=self.task.classes)
        beyond = min(max(STORED_BEYOND_CROP, data.crop[0] ** -0.5), MOST_BEYOND) if data.crop else STORED_BEYOND_CROP
        spec = Spec(wanted, size, "", data.crop is not None, beyond=round(beyond, 2))
        task = self.task
        return ClassReader(
            fitting(spec, samples, data.store),
            crop=data.crop,
            on_device=data.crop is not None and data.augment_on == "device",
            changes=Changes(task.flip, task.augment, task.color_jitter, task.erase),
            mixing=Mixing(task.mixup, task.cutmix, task.mix_probability),
        )

    def example(self, config: Config, size: int, count: int, seed: int = 0) -> dict[str, torch.Tensor]:  # noqa: ARG002
        rng = torch.Generator().manual_seed(seed)
        return {
            "images": torch.randint(0, 256, (count, size, size, 3), generator=rng, dtype=torch.uint8),
            "label": torch.randint(self.task.classes, (count,), generator=rng),
            "seed": torch.randint(0, 2**62, (count,), generator=rng),
        }

    def measure(self, name: str, config: Config, size: int) -> ModelSize:
        try:
            return super().measure(name, config, size)
        except ValueError:
            raise
        except Exception as error:  # a timm model's own code, which was written for whatever it takes
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{name} cannot be run on pictures of {size} pixels: {reason}") from error

    def normalisation(self, model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
        seen = cast(Any, model).pretrained_cfg
        return seen["mean"], seen["std"]

    def resizing(self, config: Config) -> Resizing:
        return Resizing(kernel=config["interpolation"], crop=config["crop_pct"])

    def save(self, folder: Path, model: nn.Module, config: Config, size: int) -> None:
        """A folder that unmodified timm loads: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
        options = {name: value for name, value in options_of(config, size).items() if name != "drop_path_rate"}
        seen = {
            "mean": config["mean"],
            "std": config["std"],
            "interpolation": config["interpolation"],
            "crop_pct": config["crop_pct"],
            "crop_mode": "center",
            "input_size": [3, size, size],
        }
        write_timm(folder, TimmCheckpoint(model, config["architecture"], options, seen))

    def load(self, folder: Path) -> nn.Module:
        return _seeing(read_timm(folder))

    def model_in(self, path: Path, called: str) -> str:
        """The name in its `stage.json`, or timm's architecture where its `config.json` gives nothing else for it."""
        if called or not path.is_dir() or not is_timm(path):
            return called
        found = read_timm(path)
        plain = found.options.keys() <= {"num_classes", "img_size", "drop_path_rate", "drop_rate"}
        return found.architecture if plain else ""

    def read(self, path: Path, model: str) -> Read:
        """A folder as timm saves it, or a file of weights, of a model that tells as many classes apart."""
        config = dict(self.config(model))
        if not is_timm(path, config["architecture"]) or (path.is_file() and model in OWN and OWN[model].options):
            raise CheckpointError(f"{path} is no timm model: a folder with {CONFIG}, or weights of a timm architecture")
        found = read_timm(path, config["architecture"])
        classes = found.options.get("num_classes", 1000)
        if classes != self.task.classes:
            raise CheckpointError(f"it tells {classes} classes apart, and task.classes is {self.task.classes}")
        for name in ("mean", "std"):
            config[name] = found.preprocessing.get(name) or config[name]
        return Read(_seeing(found), config)

    def inherited(self, config: Config, before: Config) -> Config:
        """Pictures are normalised as they were for the weights that grow."""
        return {**config, "mean": before["mean"], "std": before["std"]}


def _seeing(found: TimmCheckpoint) -> nn.Module:
    """The model of a checkpoint, which knows how it sees pictures."""
    seen = {name: value for name, value in found.preprocessing.items() if value is not None}
    cast(Any, found.model).pretrained_cfg = {**cast(Any, found.model).pretrained_cfg, **seen}
    return found.model
