"""Multiply-accumulates (MACs) of a model's forward pass and of training stages: the unit in which chains are compared.

The convention of method.md, which reproduces the paper's percentages: forward MACs of every matrix product including
the attention products Q·Kᵀ and A·V (full, not halved for the causal mask), embedding look-ups free; training a sample
costs three student forwards (forward, and twice that backward) and one teacher forward, each on one image and all its
captions.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from raychain.families import build


class ForwardMacs(NamedTuple):
    """MACs of one forward pass: the image tower on one image, the text tower on one caption, projections included."""

    image: int
    text: int

    def sample(self, captions: int) -> int:
        """MACs of one sample: one image and `captions` captions."""
        return self.image + captions * self.text


@lru_cache(maxsize=256)
def forward_macs(name: str, image_size: int | None = None) -> ForwardMacs:
    """The forward MACs of a model of `raychain.families`, counted on shapes alone (nothing is allocated or computed).

    Raises UnknownModelError for an unknown name, ValueError for an image size the model cannot take.
    """
    model = build(name, seed=0, image_size=image_size, device="meta").eval()
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.empty(1, 3, height, width, device="meta")
    tokens = torch.zeros(1, model.context_length, dtype=torch.long, device="meta")
    return ForwardMacs(image=_count(model.encode_image, image), text=_count(model.encode_text, tokens))


def stage_macs(student: ForwardMacs, teacher: ForwardMacs | None, samples: int, captions: int) -> int:
    """MACs of training `student` on `samples` samples of one image and `captions` captions, with or without a
    teacher.
    """
    forward = 3 * student.sample(captions) + (teacher.sample(captions) if teacher is not None else 0)
    return samples * forward


def _count(forward: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> int:
    # Gradients stay enabled: without them nn.MultiheadAttention takes a fused path that the counter does not see.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        forward(inputs)
    return counter.get_total_flops() // 2
