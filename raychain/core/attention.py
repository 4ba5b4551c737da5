"""The attention kernel that torch takes."""

from __future__ import annotations

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def unfused_on_cpus(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within, attention on CPUs is computed without fused kernels, in all threads of the process.

    The fused bf16 attention is slow there: a CoM-micro-L step took 0.85 s with it, 0.57 s without (one thread).
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
