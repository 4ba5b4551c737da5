"""What is proposed for each paradigm: which samples it needs, and models to begin with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from raychain.starting.probe import Held

SMALL = 100
"""Pixels below which pictures are for the micro models."""


class Kind(NamedTuple):
    """A paradigm's needs and a first proposal."""

    missing: Callable[[Held], str]
    """What the samples lack; empty where nothing is."""
    family: Callable[[Held, bool], str]
    """Models for these samples, with and without GPUs; empty where the user has to name some."""
    captions: bool = False
    """Whether it learns from captions, so that `data.captions` matters."""
    measured: str = ""
    """The type of evaluator that its held-out data is for, where it is not zero-shot and retrieval."""
    looks: bool = True
    """Whether its samples are pictures in tar files, into which one can look."""


def _pairs_missing(held: Held) -> str:
    if not held.pictures:
        return f"no pictures; members are {', '.join(held.extensions) or 'of no known kind'}"
    return "" if held.keys else "no captions: neither txt nor texts in json"


def _pairs_family(held: Held, gpus: bool) -> str:
    return "CoM-ViT-{T,S,B,L}-16" if gpus and held.side >= SMALL else "CoM-micro-{S,M,L}"


PAIRS = Kind(_pairs_missing, _pairs_family, captions=True)


def _classes_missing(held: Held) -> str:
    return "" if held.pictures and held.classes else "no pictures with a class (cls)"


def _classes_family(_held: Held, gpus: bool) -> str:
    return "CoM-DeiT-{T,S,B}" if gpus else "CoM-micro-DeiT-{S,M,L}"


def _text_family(_held: Held, gpus: bool) -> str:
    return "" if gpus else "CoM-LM-{XS,S,M}"


CLASSES = Kind(_classes_missing, _classes_family, measured="accuracy")
TEXT = Kind(lambda _held: "", _text_family, measured="perplexity", looks=False)
OTHER = Kind(lambda _held: "", lambda _held, _gpus: "", looks=False)
"""A paradigm whose samples and models are its own."""
KINDS = {"clip": PAIRS, "siglip": PAIRS, "classify": CLASSES, "lm": TEXT}


def kind_of(paradigm: str) -> Kind:
    """What is proposed for a paradigm by its name."""
    return KINDS.get(paradigm, OTHER)
