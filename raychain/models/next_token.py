"""The next-token loss of transformers' language models, whose logits are never held for more than a few rows.

b sequences, L tokens, D features, V words.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

VALUES = 2**24
"""Logits that are held at a time."""


def hidden_states(model: Any, ids_bL: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """[b, L, D]: what the head reads, after the last norm. Attention is causal; `mask` says the same in a tensor."""
    out = model.base_model(input_ids=ids_bL, attention_mask=mask, use_cache=False)
    found: torch.Tensor = out.last_hidden_state
    return found


def token_losses(model: Any, hidden_bLD: torch.Tensor, target_bL: torch.Tensor) -> torch.Tensor:
    """[b, L]: the cross-entropy of each token, in nats and in fp32 at least.

    The head runs again in the backward pass, part by part.
    """
    weight_VD = model.get_output_embeddings().weight
    hidden, target = hidden_bLD.flatten(0, 1), target_bL.flatten()
    rows = max(1, VALUES // len(weight_VD))
    parts = []
    for part, wanted in zip(hidden.split(rows), target.split(rows), strict=True):
        if len(hidden) > rows and torch.is_grad_enabled():
            parts.append(checkpoint(_losses, part, weight_VD, wanted, use_reentrant=False))
        else:
            parts.append(_losses(part, weight_VD, wanted))
    return torch.cat(parts).view_as(target_bL)


def _losses(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    logits = hidden_ND @ weight_VD.T
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target_N, reduction="none")
