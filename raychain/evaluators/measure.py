"""The measurement of one model: every rank of the context's world calls it and gets all metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from raychain.evaluators.context import Context
from raychain.evaluators.evaluator import HeldOut


def measure(model: nn.Module, held_out: HeldOut, context: Context) -> dict[str, float]:
    """The metrics of the model on `held_out`, by key.

    Work and reading are divided among the ranks of `context.world`, and all get the same numbers, however many they
    are. In fp32 without autocast. The mode of each module (training or evaluation) is afterwards what it was.

    Raises OSError for a shard that cannot be read, FloatingPointError where the model's features are not finite.
    """
    with _measuring(model, context.device):
        return held_out.run(model, context)


@contextlib.contextmanager
def _measuring(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradients, full fp32; afterwards every module's mode and the precision are what they were."""
    training = [module for module in model.modules() if module.training]
    precision = torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for module in training:
            module.training = True
