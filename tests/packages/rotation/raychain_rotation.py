"""Rotation prediction (Gidaris et al. 2018) as a paradigm: pictures alone, of which a ViT says how they were turned."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from raychain.config.data import Data
from raychain.data.members import Wanted
from raychain.data.pictures import PictureReader
from raychain.data.shards import Shard, survey
from raychain.data.spec import Spec, fitting
from raychain.models import UnknownModelError
from raychain.paradigms.base import Config, Paradigm, initialised
from raychain.paradigms.objective import Columns, Encoded, Objective, Projector
from raychain.paradigms.task import Task

MODELS = {
    "rot-S": {"embed_dim": 32, "depth": 1, "num_heads": 1},
    "rot-M": {"embed_dim": 64, "depth": 2, "num_heads": 2},
}
WANTED = Wanted()


class RotationObjective(Objective):
    """Cross-entropy of the four quarter turns; how a sample is turned follows from its seed."""

    separable, feature_names = True, ("pooled",)

    def encode(self, part: Columns) -> Encoded:
        turn = part["seed"] % 4
        pixels = part["images"].permute(0, 3, 1, 2).float() / 127.5 - 1
        turned = torch.stack([pixels.rot90(k, (2, 3)) for k in range(4)])[
            turn, torch.arange(len(turn), device=turn.device)
        ]
        pooled = self.model.forward_head(self.model.forward_features(turned), pre_logits=True)
        losses = F.cross_entropy(self.model.head(pooled).float(), turn, reduction="none")
        return Encoded((losses,), (F.normalize(pooled.float(), dim=-1),))


class RotationTask(Task):
    """`task: {paradigm: rotation}`."""

    patch: int = 8
    """Pixels a side of a patch."""


class Rotation(Paradigm):
    """Chains of small ViTs on pictures without captions or labels."""

    name, options, samples = "rotation", RotationTask, "pictures"

    def config(self, model: str) -> Config:
        if model not in MODELS:
            raise UnknownModelError(f"{model!r} is none of {', '.join(MODELS)}")
        return {**MODELS[model], "patch_size": self.task.patch}

    def native_size(self, config: Config) -> int:
        return 4 * config["patch_size"]

    def build(self, config: Config, *, size: int, seed: int, device: str | torch.device = "cpu") -> nn.Module:
        return initialised(lambda: VisionTransformer(size, num_classes=4, **config), seed=seed, device=device)

    def objective(self, model: nn.Module, config: Config, teacher: Config | None = None) -> Objective:
        sizes = {"pooled": (config["embed_dim"], teacher["embed_dim"])} if teacher else {}
        return RotationObjective(model, Projector(sizes) if teacher else None)

    def survey(self, addresses: Sequence[str], data: Data, cache: Path, where: str) -> list[Shard]:
        return survey(addresses, WANTED, cache, where)

    def reader(self, data: Data, config: Config, size: int, samples: int) -> PictureReader:
        spec = Spec(WANTED, size, "", data.crop is not None)
        return PictureReader(fitting(spec, samples, data.store), crop=data.crop)

    def example(self, config: Config, size: int, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
        images = torch.zeros(count, size, size, 3, dtype=torch.uint8)
        return {"images": images, "seed": torch.arange(seed, seed + count)}
