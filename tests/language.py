"""Small language models, as after training, and the double precision in which growth is checked."""

from __future__ import annotations

from typing import Any

import torch
from growing import perturb
from torch import nn

from raychain.paradigms.lm.models import build, checked

ROTARY = {"rms_norm_eps": 1e-2, "rope_theta": 10000.0, "head_dim": 8, "max_position_embeddings": 64}


def rotary(kind: str, width: int, layers: int, heads: int, kv: int, mlp: int, **own: Any) -> dict[str, Any]:
    """A Llama's or Qwen3's configuration."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp}
    return {"model_type": kind, **ROTARY, **sizes, "num_key_value_heads": kv, "vocab_size": 61} | own


def gpt2(width: int, layers: int, heads: int, **own: Any) -> dict[str, Any]:
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 64, "layer_norm_epsilon": 1e-2}
    return {"model_type": "gpt2", **sizes, "vocab_size": 61} | own


def exact(config: dict[str, Any], seed: int = 0, *, trained: bool = True) -> Any:
    """The model in float64, of which transformers computes RMSNorm in float32 otherwise; `trained`: perturbed."""
    model = build(checked(config, "test"), seed=seed).double().eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _RmsNorm(module)
    return perturb(model, seed) if trained else model


class _RmsNorm:
    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.module.variance_epsilon).rsqrt()
        return self.module.weight * (x * scale)


def tokens(count: int = 3, length: int = 20, vocabulary: int = 61) -> torch.Tensor:
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(5))
