"""What a language model costs, counted on shapes alone: two of its layers stand for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from raychain.models.next_token import hidden_states
from raychain.paradigms.lm.models import build
from raychain.planning.macs import ModelSize, PartSize

LAYERS = ("num_hidden_layers", "n_layer")
DECODER, TOKENS = "decoder", "tokens"


def measured(name: str, config: Mapping[str, Any], length: int) -> ModelSize:
    """The decoder, whose parameters expansion ratios are about, and the token table with the head.

    A teacher is asked for hidden states, so it does without the head. Attention counts in full, as elsewhere.
    """
    key = next(key for key in LAYERS if key in config)
    one, two = (_counted({**config, key: layers}, length) for layers in (1, 2))
    more = config[key] - 1
    decoder = PartSize(*(a + more * (b - a) for a, b in zip(one, two, strict=True)))
    model = build({**config, key: 1}, seed=0, device="meta")
    tables = _tables(model)
    weight = model.get_output_embeddings().weight
    head = PartSize(sum(table.numel() for table in tables), length * weight.numel(), 0)
    return ModelSize(name, {DECODER: decoder, TOKENS: head}, DECODER, for_loss=(TOKENS,))


def _tables(model: Any) -> list[torch.Tensor]:
    """Tables of tokens and positions and the head, each once."""
    found = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    head = model.get_output_embeddings().weight
    return found if any(head is table for table in found) else [*found, head]


def _counted(config: Mapping[str, Any], length: int) -> PartSize:
    """Parameters, MACs and kept values of the layers and the last norm."""
    model = build(config, seed=0, device="meta")
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # the tensors stay alive, so that no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        attends = tensor.ndim == 4 and tensor.shape[-1] == tensor.shape[-2] == length
        if not attends and (address := tensor.untyped_storage()._cdata) not in own:
            kept[address] = tensor
        return tensor

    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")  # transformers asks values for its own
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        FlopCounterMode(display=False) as counter,
    ):
        hidden_states(model, ids, mask)
    params = sum(parameter.numel() for parameter in model.parameters()) - sum(t.numel() for t in _tables(model))
    values = sum(tensor.untyped_storage().nbytes() // 4 for tensor in kept.values())
    return PartSize(params, counter.get_total_flops() // 2, values)
