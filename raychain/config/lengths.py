"""Lengths in tokens, which an experiment with text may give: they are samples, as all samples are as long."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_TOKENS = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*tokens?\s*")


def in_samples(tree: Any) -> Any:
    """An experiment as a user writes it, with `"N tokens"` as the samples that they are.

    Where samples are no text they are left, for their own option to refuse.
    """
    from raychain.paradigms import make_paradigm, make_task

    if not isinstance(tree, Mapping) or not _has_any(tree):
        return tree
    try:
        tokens = make_paradigm(make_task(tree.get("task"))).sample_tokens
    except ValueError:  # pydantic's too; `task` tells of it itself
        return tree
    return _converted(tree, tokens) if tokens else tree


def _has_any(tree: Any) -> bool:
    if isinstance(tree, Mapping):
        return any(map(_has_any, tree.values()))
    if isinstance(tree, list | tuple):
        return any(map(_has_any, tree))
    return isinstance(tree, str) and _TOKENS.fullmatch(tree) is not None


def _converted(tree: Any, tokens: int) -> Any:
    if isinstance(tree, Mapping):
        return {key: _converted(value, tokens) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_converted(value, tokens) for value in tree)
    found = _TOKENS.fullmatch(tree) if isinstance(tree, str) else None
    return f"{float(found[1]) / tokens:.12g} samples" if found else tree
