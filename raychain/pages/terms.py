"""What the page's words mean: told where a word is pointed at or focused, and in a list at the end."""

from __future__ import annotations

from raychain.pages.markup import Markup, tag

TERMS = {
    "MACs": "Multiply-accumulates: the arithmetic of training, forward and backward, the teacher's forward passes "
    "included. It is counted from the models' shapes, so it is the same on every machine. K, M, G, T, P, E: powers "
    "of a thousand.",
    "speed-up": "The MACs of training the last model alone over those of the chain. It says what was saved, and "
    "nothing of how good the model is.",
    "chain": "Models from small to large; each starts from the one before.",
    "stage": "The training of one model of a chain.",
    "alone": "The last model trained from random weights, without a chain, for as long as the experiment's baseline "
    "says (the epochs of the first stage where it says nothing).",
    "growth": "How many times the model's parameters are those of the one it starts from (of the main tower, where "
    "there is one).",
    "distillation": "While it trains, a larger model is also pulled towards the smaller one's features.",
    "top-1": "Share of held-out pictures whose right class the model puts first, by the classes' names alone.",
    "i2t R@1": "Share of held-out pictures for which the model finds their caption first among all.",
    "t2i R@1": "Share of held-out captions for which the model finds their picture first among all.",
    "gap": "Seconds from the last step of the stage before to the first step of this one.",
    "data wait": "Seconds in which training waited for data.",
    "parameters": "Numbers that are learned, of all towers together.",
    "steps": "Optimiser steps, each on one global batch.",
    "epochs": "Passes over the training data.",
    "trial": "A chain that a search tried; stages that trials share are trained once.",
    "Pareto": "No cheaper trial was as good.",
}
"""By the word as it stands in the page."""
_TAKEN = ("zero-shot ",)


def explained(text: str) -> Markup | str:
    """The text, as a button that tells what it means where that is known; else as it is."""
    key = _key(text)
    if key is None:
        return text
    return tag("button", text, type="button", class_="term", aria_describedby=_id(key))


def glossary(shown: str) -> Markup | None:
    """The meanings of the terms that stand in a page."""
    used = [key for key in TERMS if f'aria-describedby="{_id(key)}"' in shown]
    if not used:
        return None
    items = [part for key in used for part in (tag("dt", key), tag("dd", TERMS[key], id=_id(key)))]
    return tag("section", tag("h2", "Terms"), tag("dl", *items, class_="terms"))


def _key(text: str) -> str | None:
    plain = text
    for word in _TAKEN:
        plain = plain.removeprefix(word)
    found = [key for key in TERMS if plain == key or plain.startswith(f"{key} ") or plain.endswith(f" {key}")]
    return max(found, key=len) if found else None


def _id(key: str) -> str:
    return f"term-{key.lower().replace(' ', '-').replace('@', '')}"
