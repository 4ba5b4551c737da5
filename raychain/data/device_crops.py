"""Random crops resized on the accelerator: one product of matrices a side, instead of a kernel call a picture."""

from __future__ import annotations

import torch

from raychain.data.decode import scale_into

TOGETHER = 2**27
"""Bytes of the fp32 pictures that are worked on at once."""


def resized(window_nPP3: torch.Tensor, side_n2: torch.Tensor, mirrored_n: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [n, size, size, 3] of crops, uint8 [n, P, P, 3] in whose upper left corners they lie with the height and
    width `side_n2`: bicubic with antialiasing, and mirrored where `mirrored_n` is set.

    It is what `decode.scale_into` computes, and on a CPU that itself; elsewhere in fp32, rounded as that is after each
    side, and so within a level or two of it.
    """
    if window_nPP3.device.type == "cpu":
        return _one_by_one(window_nPP3, side_n2, mirrored_n, size)
    return in_fp32(window_nPP3, side_n2, mirrored_n, size)


def _one_by_one(window_nPP3: torch.Tensor, side_n2: torch.Tensor, mirrored_n: torch.Tensor, size: int) -> torch.Tensor:
    found = window_nPP3.new_empty((len(window_nPP3), size, size, 3))
    window_n3PP, found_n3ss = window_nPP3.permute(0, 3, 1, 2), found.permute(0, 3, 1, 2)
    for i, (height, width) in enumerate(side_n2.tolist()):
        scale_into(found_n3ss[i : i + 1], window_n3PP[i : i + 1, :, :height, :width])
    return torch.where(mirrored_n[:, None, None, None], found.flip(2), found) if mirrored_n.any() else found


def in_fp32(window_nPP3: torch.Tensor, side_n2: torch.Tensor, mirrored_n: torch.Tensor, size: int) -> torch.Tensor:
    """What `resized` returns, uint8 [n, size, size, 3], computed in fp32 by two products of matrices, one for each side
    of the pictures; on any device."""
    padded = window_nPP3.shape[1]
    together = max(1, TOGETHER // (4 * 3 * padded**2))
    found = window_nPP3.new_empty((len(window_nPP3), size, size, 3))
    for first in range(0, len(window_nPP3), together):
        part = slice(first, first + together)
        down_nsP, across_nsP = (_weights(side, size, padded) for side in side_n2[part].unbind(1))
        across_nsP = torch.where(mirrored_n[part, None, None], across_nsP.flip(1), across_nsP)
        x_nPs3 = _levels(torch.einsum("nsp,nqpc->nqsc", across_nsP, window_nPP3[part].float()))
        x_nss3 = _levels((down_nsP @ x_nPs3.flatten(2)).unflatten(2, (size, 3)))
        found[part] = x_nss3.to(torch.uint8)
    return found


def _levels(x: torch.Tensor) -> torch.Tensor:
    """Whole levels of 0 to 255."""
    return x.round_().clamp_(0, 255)


def _weights(side_n: torch.Tensor, size: int, padded: int) -> torch.Tensor:
    """fp32 [n, size, padded]: the share of each pixel of a side in each of `size` pixels."""
    scale_n11 = side_n[:, None, None].float() / size
    place_p = torch.arange(padded, device=side_n.device, dtype=torch.float32)
    centre_s1 = torch.arange(size, device=side_n.device, dtype=torch.float32)[:, None] + 0.5
    x = ((place_p + 0.5 - scale_n11 * centre_s1) / scale_n11.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = torch.where(x < 1, near, far) * (x < 2) * (place_p < side_n[:, None, None])
    return weight / weight.sum(2, keepdim=True)
