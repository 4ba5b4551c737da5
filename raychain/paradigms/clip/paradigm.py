"""CLIP as a paradigm: open_clip's two-tower models on pictures with captions, in open_clip's folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from open_clip.model import set_model_preprocess_cfg
from safetensors.torch import load_file, save_file
from torch import nn

from raychain.core.json import Json
from raychain.data.members import Wanted
from raychain.data.pictures import PictureReader
from raychain.data.shards import Shard, survey
from raychain.data.spec import Spec, Tokenizer, fitting
from raychain.models import at_image_size, model_config, model_names
from raychain.models.building import NORMALISATION, build_config, preprocessing_of
from raychain.models.checkpoints import CheckpointError, config_beside, read_checkpoint
from raychain.models.configs import ConfigError
from raychain.models.generation import GenerationError, between, name_between
from raychain.models.registry import add_model, difference, name_for, native_size
from raychain.models.tokenizing import check_tokenizer, make_tokenizer
from raychain.paradigms.base import Config, Paradigm, Read, plain
from raychain.paradigms.clip.objective import ClipObjective, ImageTextObjective
from raychain.paradigms.objective import Objective, Projector
from raychain.planning.macs import ModelSize, tower_sizes

if TYPE_CHECKING:
    from raychain.config.data import Data

_TIMM_VITS = ("vit_", "deit", "eva", "beit")
CONFIG, WEIGHTS, PREPROCESSING = "open_clip_config.json", "open_clip_model.safetensors", "preprocess_cfg"


class ImageTextParadigm(Paradigm):
    """Pictures and their captions in one embedding space; subclasses choose the loss."""

    samples = "pairs"
    takes = frozenset({"pictures", "texts"})
    principled = True
    files = (CONFIG, WEIGHTS)
    library, pipeline = "open_clip", "zero-shot-image-classification"
    objective_class: ClassVar[type[ImageTextObjective]]

    def known(self) -> Sequence[str]:
        return model_names()

    def config(self, model: str) -> Config:
        return model_config(model)

    def native_size(self, config: Config) -> int:
        return native_size(config)

    def build(self, config: Config, *, size: int, seed: int, device: str | torch.device = "cpu") -> nn.Module:
        return build_config(dict(config), seed=seed, image_size=size, device=device)

    def adapt(self, model: nn.Module, config: Config, size: int) -> nn.Module:
        """The model with position embeddings interpolated to pictures of `size` pixels a side."""
        return at_image_size(model, dict(config), size)

    def normalisation(self, model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
        found = preprocessing_of(model)
        return found["mean"], found["std"]

    def tokenizer(self, config: Config) -> Tokenizer:
        return make_tokenizer(config)

    def objective(self, model: nn.Module, config: Config, teacher: Config | None = None) -> Objective:
        projector = None
        if teacher is not None:
            sizes = int(config["embed_dim"]), int(teacher["embed_dim"])
            projector = Projector(dict.fromkeys(self.objective_class.feature_names, sizes))
        return self.objective_class(model, projector)

    def survey(self, addresses: Sequence[str], data: Data, cache: Path, where: str) -> list[Shard]:
        return survey(addresses, _wanted(data), cache, where)

    def reader(self, data: Data, config: Config, size: int, samples: int) -> PictureReader:
        tokenize = make_tokenizer(config)
        spec = Spec(_wanted(data), size, tokenize.identity, data.crop is not None)
        return PictureReader(
            fitting(spec, samples, data.store),
            tokenize,
            data.captions.per_image,
            data.crop,
            on_device=data.crop is not None and data.augment_on == "device",
        )

    def measure(self, name: str, config: Config, size: int) -> ModelSize:
        check_tokenizer(config)
        image, text = tower_sizes(dict(config), size)
        return ModelSize(name, {"image": image, "text": text}, principal="image")

    def items(self, data: Data) -> dict[str, float]:
        """One picture, and all of its captions that are in the loss."""
        return {"image": 1, "text": data.captions.per_image}

    def adam(self, config: Config) -> tuple[tuple[float, float], float]:
        """open_clip's defaults and CoM-PT's, by the image tower."""
        vision = config["vision_cfg"]
        timm_name = vision.get("timm_model_name")
        vit = timm_name.startswith(_TIMM_VITS) if timm_name else isinstance(vision.get("layers", 12), int)
        return ((0.9, 0.98), 1e-6) if vit else ((0.9, 0.999), 1e-8)

    def example(self, config: Config, size: int, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
        rng = torch.Generator().manual_seed(seed)
        text = config["text_cfg"]
        shape = (count, 1, int(text.get("context_length", 77)))
        return {
            "images": torch.randint(0, 256, (count, size, size, 3), generator=rng, dtype=torch.uint8),
            "tokens": torch.randint(1, int(text.get("vocab_size", 49408)), shape, generator=rng),
            "seed": torch.randint(0, 2**62, (count,), generator=rng),
        }

    def save(self, folder: Path, model: nn.Module, config: Config, size: int) -> None:
        """A folder that unmodified open_clip loads as `local-dir:FOLDER`."""
        own = {**config, "vision_cfg": {**config["vision_cfg"], "image_size": size}}
        own.pop(PREPROCESSING, None)
        document = {"model_cfg": own, "preprocess_cfg": {**preprocessing_of(model), "size": size}}
        (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
        save_file(plain(model.state_dict()), folder / WEIGHTS)

    def load(self, folder: Path) -> nn.Module:
        document: Json = json.loads((folder / CONFIG).read_text())
        model = build_config(document["model_cfg"], seed=0)
        model.load_state_dict(load_file(folder / WEIGHTS))
        set_model_preprocess_cfg(cast(Any, model), document["preprocess_cfg"])
        return model

    def model_in(self, path: Path, called: str) -> str:
        """A known name of the model that open_clip_config.json describes; without one it is known as `called`, or as
        its folder or file is, from then on.
        """
        config = config_beside(path)
        return name_for(config, called or path.stem, self.config) if config is not None else ""

    def read(self, path: Path, model: str) -> Read:
        """What `read_checkpoint` takes: a folder of open_clip's, or a weights file."""
        config, described = self.config(model), config_beside(path)
        if described is not None and (other := difference(described, config)):
            raise CheckpointError(f"its {CONFIG} is of another model than {model}: {other}")
        found = (read_checkpoint(path) if described is not None else read_checkpoint(path, model, dict(config))).model
        own = {name: list(preprocessing_of(found)[name]) for name in NORMALISATION}
        usual = {name: list(preset) for name, preset in NORMALISATION.items()}
        return Read(found, config if own == usual else {**config, PREPROCESSING: own})

    def between(self, small: str, large: str, ratio: float, head_dim: int | None = None) -> str:
        """A vision transformer of open_clip's with a text transformer."""
        configs = model_config(small), model_config(large)
        made = between(*configs, ratio, head_dim)
        try:
            return add_model(made, name_between(small, large, configs, made))
        except ConfigError as error:
            raise GenerationError("models whose names are free", f"rename a config of `models`: {error}") from None

    def inherited(self, config: Config, before: Config) -> Config:
        """Pictures are normalised as they were for the weights that grow."""
        return {**config, PREPROCESSING: before[PREPROCESSING]} if PREPROCESSING in before else config


def _wanted(data: Data) -> Wanted:
    return Wanted(data.captions.keys, key_split=data.key_split)


class Clip(ImageTextParadigm):
    """The contrastive loss of CLIP and, with several captions, LaCLIP."""

    name = "clip"
    objective_class = ClipObjective
