"""What is exported: a stage folder or another checkpoint of open_clip's two towers, and inputs to compare by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from raychain.core.attention import unfused_on_cpus
from raychain.models.building import preprocessing_of

SAMPLES = 2
CLOSE = 2e-4
"""Largest difference from the original features, relative to their largest number, that rounding explains in fp32."""


class RefusedError(ValueError):
    """A model that the other library has no exact equal of; the message says why."""


class Source(NamedTuple):
    """A model of open_clip's, in fp32 on the CPU."""

    model: Any
    config: Mapping[str, Any]
    """Its `model_cfg`."""

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """open_clip's `preprocess_cfg`."""
        return preprocessing_of(self.model)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of its pictures."""
        size = self.model.visual.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def pictures(self) -> torch.Tensor:
        """Random pictures, as if they were normalised."""
        rng = torch.Generator().manual_seed(0)
        return torch.randn(SAMPLES, 3, *self.pixels, generator=rng)

    def tokens(self) -> torch.Tensor:
        """Token ids of texts of different lengths, padded with zeros, as open_clip's tokeniser gives them."""
        from raychain.models.tokenizing import make_tokenizer

        return torch.from_numpy(make_tokenizer(self.config)(["a red thing", "two small things, and a line"])).long()

    @torch.inference_mode()
    def encode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of the random pictures and of the texts, not normalised."""
        with unfused_on_cpus(torch.device("cpu")):
            return self.model.encode_image(self.pictures()), self.model.encode_text(self.tokens())


def compared(found: torch.Tensor, wanted: torch.Tensor, what: str) -> float:
    """The largest difference, relative to the largest number wanted. Raises RefusedError where it is no rounding."""
    if found.shape != wanted.shape:
        raise RefusedError(f"its {what} would be {tuple(found.shape)} and not {tuple(wanted.shape)}")
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if not difference <= CLOSE:
        raise RefusedError(f"its {what} would differ by {difference:.1e} of the largest: it is no model of that kind")
    return difference


def loaded(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Loads all of the tensors into the model, which has no others. Raises RefusedError."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if lacking := sorted(shapes.keys() - tensors.keys()):
        raise RefusedError(f"it has nothing for {lacking[0]}")
    if left := sorted(tensors.keys() - shapes.keys()):
        raise RefusedError(f"there is no place for its {left[0]}")
    for name, shape in shapes.items():
        if shape != tuple(tensors[name].shape):
            raise RefusedError(f"{name} would be {shape}, and it has {tuple(tensors[name].shape)}")
    model.load_state_dict(dict(tensors))
