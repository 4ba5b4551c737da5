"""Cross-entropy of classes, or their binary cross-entropy. b local batch, C classes, D features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from raychain.core.attention import unfused_on_cpus
from raychain.paradigms.classify.drop_path import seed_drop_path
from raychain.paradigms.classify.task import ClassifyTask
from raychain.paradigms.objective import Columns, Encoded, Objective, Projector


class ClassifyObjective(Objective):
    """The loss of a timm model's class scores; distilled is what its classifier reads, the pooled features."""

    separable = True
    feature_names = ("pooled",)
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        task: ClassifyTask,
        mean: Sequence[float],
        std: Sequence[float],
        projector: Projector | None = None,
    ) -> None:
        super().__init__(model, projector)
        self.task, self.seeds = task, seed_drop_path(model)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def encode(self, part: Columns) -> Encoded:
        pooled = self._pooled(part)
        scores_bC = self.model.get_classifier()(pooled).float()
        return Encoded((losses(scores_bC, targets(part, self.task), self.task.loss),), (normalised(pooled),))

    def features(self, part: Columns) -> tuple[torch.Tensor, ...]:
        return (normalised(self._pooled(part)),)

    def _pooled(self, part: Columns) -> torch.Tensor:
        pixels = (part["images"].permute(0, 3, 1, 2).float() - self.mean) / self.std
        with unfused_on_cpus(pixels.device), self.seeds.of(part["seed"]):
            pooled: torch.Tensor = self.model.forward_head(self.model.forward_features(pixels), pre_logits=True)
        return pooled


def normalised(pooled_bD: torch.Tensor) -> torch.Tensor:
    """Features of length 1, in fp32."""
    return F.normalize(pooled_bD.float(), dim=-1)


def targets(part: Columns, task: ClassifyTask) -> torch.Tensor:
    """[b, C]: the smoothed class of each picture, with that of the picture that was mixed into it."""
    label = part["label"]
    spread = task.smoothing / task.classes
    found = torch.full((len(label), task.classes), spread, device=label.device)
    share = part["share"] if "share" in part else torch.ones(len(label), device=label.device)
    own = (share * (1 - task.smoothing))[:, None]
    found = found.scatter_add(1, label[:, None], own)
    if "other" in part:
        found = found.scatter_add(1, part["other"][:, None], ((1 - share) * (1 - task.smoothing))[:, None])
    return found if task.bce_threshold is None else (found > task.bce_threshold).to(found.dtype)


def losses(scores_bC: torch.Tensor, target_bC: torch.Tensor, kind: str) -> torch.Tensor:
    """The samples' losses [b]."""
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(scores_bC, target_bC.to(scores_bC.dtype), reduction="none").sum(-1)
    return -(target_bC * scores_bC.log_softmax(-1)).sum(-1)
