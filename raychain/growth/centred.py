"""`centred`: a wider residual stream whose LayerNorms see what they saw before, for any ratio of widths."""

from math import sqrt

import torch

from raychain.growth.shared import start_new_dimensions
from raychain.growth.width import AxisGrowth, Cell, matching_positions

PRE_NORM_AMPLITUDE = 0.5


class Centred:
    """Function-preserving growth of pre-LN transformers by a stream that keeps its statistics.

    Let the stream grow from w to W coordinates and g = √(w/W). What is written to the old coordinates is divided by
    g; every new coordinate receives the *mean* of the old ones. The stream's mean is then the old mean over g, its
    variance exactly the old variance, and a LayerNorm whose gain is multiplied by g returns what it returned, and
    zero (its bias) on the new coordinates. So what reads those is free and keeps its random init, which breaks the
    symmetry; new heads and MLP units keep their random input side and start with a zero output side. Every operation
    is linear in the writers, so it is exact:

    - a writer W, b → [W; mean of W's rows] / g. With layer scale γ after it, γ → [γ; rms γ] / g and the new rows are
      the mean of γ·W over rms γ.
    - a LayerNorm that itself writes the stream (CLIP's ln_pre, Swin's patch norm; gain γ over its own stream x):
    elementwise,
      it can produce the mean of its outputs, mean(γ·x)/σ, only from a coordinate that holds it. The new coordinates
      of x hold ± a·mean(γ·(x - mean x)) on top of the mean, their gains are ± 1/a. The signs cancel in the mean of x;
      its variance changes by a²·mean(γ·x)², the only approximation in a ViT.
    - Swin's patch merging normalises four neighbours at once, whose means differ. They survive (zero-padding would
    lose them),
      but the new coordinates add their variance to the LayerNorm's: an error of scale only, none where the width stays.

    Where RMSNorms read the stream (`Space.centred` is False) its new coordinates hold nothing: the mean square of the W
    coordinates is then the old one of w, as the old ones are divided by g, with the same epsilon, and gains times g
    return what they returned.

    A head that is the token table itself (`Parameter.before_tied`) has its rows divided by g, as they write the stream:
    the norm before it returns g times as much, by one more factor in its gain and its shift.

    A LayerNorm over the mean-preserving stream makes the construction equivalent to centring every writer and padding
    with zeros, without touching the layer scale or the small model's weights.
    """

    def weight(self, cell: Cell) -> torch.Tensor:
        grown = matching_positions(cell, cell.init)
        for dim, axis in enumerate(cell.axes):
            if axis.kind == "units" and axis.side == "in" and axis.grows:
                _new(grown, dim, axis).zero_()
        for dim, axis in enumerate(cell.axes):
            if axis.kind == "stream" and axis.side == "out" and axis.grows:
                self._write(cell, grown, dim, axis)
            elif axis.kind == "stream" and axis.side == "through" and axis.grows:
                self._normalise(cell, grown, dim, axis)
        return start_new_dimensions(cell, grown)

    def gradient(self, cell: Cell, power: int) -> torch.Tensor:
        """What writes the stream divided by g meets g times the gradient, a gain multiplied by g meets 1/g of it."""
        grown = matching_positions(cell, torch.full_like(cell.init, torch.nan))
        role = cell.parameter.role
        for axis in cell.axes:
            if axis.kind != "stream":
                continue
            if axis.side == "through" and role in ("gain", "shift"):
                factors = (role == "gain") + cell.parameter.before_tied
                grown = grown / _g(axis) ** (factors * power)
            elif axis.side == "out" and role != "gain" and cell.parameter.scaled_by is None:
                grown = grown * _g(axis) ** power
        return grown

    def _write(self, cell: Cell, grown: torch.Tensor, dim: int, axis: AxisGrowth) -> None:
        """What the stream's old and new coordinates receive from `cell`'s parameter."""
        old, new = grown.narrow(dim, 0, axis.small), _new(grown, dim, axis)
        if not axis.space.centred:
            new.zero_()
            old.div_(_g(axis))
        elif cell.parameter.role == "gain":
            new.copy_(_signs(new.shape[dim], old) / PRE_NORM_AMPLITUDE)
        elif cell.parameter.role == "scale":
            new.fill_(_rms(old) / _g(axis))
            old.div_(_g(axis))
        elif cell.parameter.scaled_by is not None:
            scale = cell.lookup(cell.parameter.scaled_by)
            new.copy_(_weighted_mean(old, scale, dim) / _rms(scale).clamp_min(torch.finfo(old.dtype).tiny))
        else:
            mean = old.mean(dim, keepdim=True)
            if axis.space.gain is not None:
                lost = _weighted_mean(old - mean, cell.lookup(axis.space.gain), dim)
                signs = _along(dim, old.ndim, _signs(new.shape[dim], old))
                new.copy_((mean + PRE_NORM_AMPLITUDE * signs * lost) / _g(axis))
            else:
                new.copy_((mean / _g(axis)).expand_as(new))
            old.div_(_g(axis))

    @staticmethod
    def _normalise(cell: Cell, grown: torch.Tensor, dim: int, axis: AxisGrowth) -> None:
        """A norm's gain and shift. One over several tokens at once must also drop the new coordinates."""
        factors = (cell.parameter.role == "gain") + cell.parameter.before_tied
        grown.narrow(dim, 0, axis.small).mul_(_g(axis) ** factors)
        if cell.parameter.role == "shift" or len(cell.axes) > 1:
            _new(grown, dim, axis).zero_()


def _g(axis: AxisGrowth) -> float:
    return sqrt(axis.small / axis.large)


def _new(tensor: torch.Tensor, dim: int, axis: AxisGrowth) -> torch.Tensor:
    return tensor.narrow(dim, axis.small, axis.large - axis.small)


def _rms(scale: torch.Tensor) -> torch.Tensor:
    return scale.square().mean().sqrt()


def _weighted_mean(tensor: torch.Tensor, weights: torch.Tensor, dim: int) -> torch.Tensor:
    return (tensor * _along(dim, tensor.ndim, weights)).mean(dim, keepdim=True)


def _along(dim: int, ndim: int, vector: torch.Tensor) -> torch.Tensor:
    return vector.reshape([-1 if index == dim else 1 for index in range(ndim)])


def _signs(count: int, like: torch.Tensor) -> torch.Tensor:
    """Nonzero numbers with sum 0: ±1 alternating, an odd count ends in 1, 1, -2. A single one cannot: it is 1."""
    signs = like.new_ones(count)
    signs[1::2] = -1
    if count % 2 and count > 1:
        signs[-3:] = like.new_tensor([1, 1, -2])
    return signs
