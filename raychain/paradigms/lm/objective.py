"""The objective of a causal language model: the next token. b sequences, L tokens, D features."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from raychain.models.next_token import hidden_states, token_losses
from raychain.paradigms.objective import Columns, Encoded, Objective


class LanguageObjective(Objective):
    """The mean cross-entropy of a sequence's L next tokens; what is distilled are the hidden states before the head.

    Batches have `tokens`, int64 [b, L + 1].
    """

    separable, feature_names = True, ("hidden",)

    def encode(self, part: Columns) -> Encoded:
        """See Objective. Features are there where something follows a teacher with them."""
        ids_bL = part["tokens"]
        hidden_bLD = hidden_states(self.model, ids_bL[:, :-1])
        losses = token_losses(self.model, hidden_bLD, ids_bL[:, 1:]).mean(1)
        return Encoded((losses,), (_unit(hidden_bLD),) if self.projector is not None else ())

    def features(self, part: Columns) -> tuple[torch.Tensor, ...]:
        """See Objective: without the head."""
        return (_unit(hidden_states(self.model, part["tokens"][:, :-1])),)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
