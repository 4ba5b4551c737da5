"""Depth operators: which of the small model's n layers each of the large model's N layers takes over, and as what."""

from collections.abc import Callable
from typing import NamedTuple


class LayerSource(NamedTuple):
    """Layer `layer` of the small model; `inert`: its residual branches end in zeros, so that the block is the
    identity.
    """

    layer: int
    inert: bool = False


DepthOperator = Callable[[int, int], list[LayerSource]]


def interleave(small: int, large: int) -> list[LayerSource]:
    """The paper's rule: layer i is copied to its successors 2i and 2i + 1; in general layer j takes layer ⌊j·n/N⌋."""
    return [LayerSource(index * small // large) for index in range(large)]


def identity(small: int, large: int) -> list[LayerSource]:
    """Layers spread as by `interleave`; the first to take a layer keeps it whole, the others start as the identity.

    The function is kept (LEMON, bert2BERT). An identity block holds its source's inner weights, so it learns at once.
    """
    layers = [source.layer for source in interleave(small, large)]
    return [LayerSource(layer, inert=layer in layers[:index]) for index, layer in enumerate(layers)]


def stack(small: int, large: int) -> list[LayerSource]:
    """The whole stack repeated: layer j takes layer j mod n (G_stack, arXiv 2405.15319)."""
    return [LayerSource(index % small) for index in range(large)]


def layer_sources(operator: DepthOperator, small: int, large: int, period: int) -> list[LayerSource]:
    """The operator's map for n = `small` and N = `large` layers, kept to layers that agree modulo `period`.

    Layers are mapped in runs of `period` (Swin: an unshifted and a shifted window), which needs both depths to be
    multiples of it wherever they differ. Raises ValueError otherwise, and where N < n.
    """
    if large < small:
        raise ValueError(f"{large} layers are fewer than the {small} they should take over")
    if small == large:
        return [LayerSource(index) for index in range(large)]
    if small % period or large % period:
        raise ValueError(
            f"depths {small} and {large} are not both multiples of {period}, the length of a group of layers"
        )
    groups = operator(small // period, large // period)
    return [LayerSource(group.layer * period + offset, group.inert) for group in groups for offset in range(period)]
