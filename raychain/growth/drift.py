"""How far growth moved a model's function: embeddings before and after, on the same inputs."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class TowerDrift:
    """One tower's embeddings after growth against those before, over the dimensions both models have.

    `cosine` is the mean over inputs, `worst_cosine` the smallest; `relative_error` is ‖after - before‖ / ‖before‖
    over all.
    """

    cosine: float
    worst_cosine: float
    relative_error: float


@torch.no_grad()
def measure_drift(
    small: nn.Module, large: nn.Module, images: torch.Tensor, tokens: torch.Tensor, batch: int = 16
) -> dict[str, TowerDrift]:
    """The drift of both towers, `image` and `text`.

    images [n, 3, H, W] and tokens [m, context] on the CPU, preprocessed for both models; they are put in evaluation
    mode.
    """
    return {
        "image": _drift(small, large, "encode_image", images, batch),
        "text": _drift(small, large, "encode_text", tokens, batch),
    }


@torch.no_grad()
def measure_backbone_drift(small: nn.Module, large: nn.Module, count: int, seed: int = 0) -> TowerDrift:
    """The drift of a timm model's outputs, class scores or pooled features, on `count` random pictures of its size.

    Both models are put in evaluation mode.
    """
    model: Any = small
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.default_cfg["input_size"][1:]
    channels = next(p.shape[1] for p in model.parameters() if p.ndim == 4)
    x_bcHW = torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(seed))
    before, after = (model.eval()(x_bcHW) for model in (small, large))
    return compared(before, after)


def random_inputs(model: nn.Module, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal noise as images [count, 3, H, W], and random captions [count, context] of every length.

    Captions begin and end as open_clip's tokenizer makes them: the vocabulary's last two tokens, then zeros.
    """
    clip: Any = model
    generator = torch.Generator().manual_seed(seed)
    size = clip.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(count, 3, height, width, generator=generator)
    vocabulary, context = clip.vocab_size, clip.context_length
    tokens = torch.randint(1, vocabulary - 2, (count, context), generator=generator)
    ends = torch.randint(min(2, context - 1), context, (count,), generator=generator)
    tokens[:, 0] = vocabulary - 2
    tokens[torch.arange(count), ends] = vocabulary - 1
    tokens[torch.arange(context) > ends[:, None]] = 0
    return images, tokens


def _drift(small: nn.Module, large: nn.Module, encode: str, inputs: torch.Tensor, batch: int) -> TowerDrift:
    return compared(*(_encoded(model, encode, inputs, batch) for model in (small, large)))


def compared(before: torch.Tensor, after: torch.Tensor) -> TowerDrift:
    """The drift between outputs [n, D] and [n, E]."""
    shared = min(before.shape[1], after.shape[1])
    before, after = before[:, :shared].double(), after[:, :shared].double()
    cosines = F.cosine_similarity(after, before, dim=1)
    error = (after - before).norm() / before.norm()
    return TowerDrift(cosines.mean().item(), cosines.min().item(), error.item())


def _encoded(model: Any, encode: str, inputs: torch.Tensor, batch: int) -> torch.Tensor:
    model.eval()
    device = model.logit_scale.device
    return torch.cat([getattr(model, encode)(part.to(device)).cpu() for part in inputs.split(batch)])
