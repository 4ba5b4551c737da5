"""Growth of language models: the function in double precision, and AdamW's moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from growing import relative_error
from language import exact, gpt2, rotary, tokens

from raychain.growth import GrowthError, Moments, grow, grow_moments
from raychain.growth.depth import layer_sources
from raychain.growth.operators import DEPTH_OPERATORS
from raychain.paradigms.lm.axes import describe

GPT2_WRITERS = ("wte.weight", "wpe.weight", "c_proj.weight", "c_proj.bias")
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    f"{kind} {'tied' if tied else 'untied'}": (
        rotary(kind, 48, 3, 6, 2, 100, tie_word_embeddings=tied),
        rotary(kind, 120, 7, 20, 4, 259, tie_word_embeddings=tied),
    )
    for kind in ("llama", "qwen3")
    for tied in (True, False)
}
PAIRS |= {f"gpt2 {'tied' if tied else 'untied'}": (gpt2(48, 3, 6, tie_word_embeddings=tied),
                                                  gpt2(120, 7, 15, tie_word_embeddings=tied))
          for tied in (True, False)}  # fmt: skip
PAIRS["llama biases"] = (rotary("llama", 48, 2, 6, 2, 100, attention_bias=True),
                         rotary("llama", 72, 3, 12, 4, 150, attention_bias=True))  # fmt: skip
PAIRS["kv heads alone"] = (rotary("llama", 48, 2, 6, 2, 100), rotary("llama", 48, 2, 12, 4, 100))
PAIRS["queries of a key alone"] = (rotary("llama", 60, 2, 6, 2, 100), rotary("llama", 60, 2, 10, 2, 100))
PAIRS["mlp alone"] = (rotary("qwen3", 48, 2, 6, 2, 100), rotary("qwen3", 48, 2, 6, 2, 177))
PAIRS["layers alone"] = (gpt2(48, 2, 6), gpt2(48, 5, 6))


def grown(pair: str, width: str = "centred", depth: str = "identity") -> tuple[Any, Any]:
    small, large = exact(PAIRS[pair][0]), exact(PAIRS[pair][1], 1)
    grow(small, large, width=width, depth=depth, describe=describe)
    return small, large


@pytest.mark.parametrize("pair", PAIRS)
def test_growth_keeps_the_function(pair: str) -> None:
    small, large = grown(pair)
    ids = tokens()
    with torch.no_grad():
        before, after = small(ids), large(ids)
        assert relative_error(after.logits, before.logits) < 1e-12
        features = [model.base_model(input_ids=ids).last_hidden_state for model in (small, large)]
    shared = features[0].shape[-1]
    unit = [F.normalize(x, dim=-1) for x in features]
    assert relative_error(unit[1], unit[0]) < 1e-12  # so distillation begins at a distance of 0
    assert shared == features[1].shape[-1] or features[1][..., shared:].abs().max() < 1e-12


@pytest.mark.parametrize("pair", [name for name in PAIRS if "alone" not in name])
def test_moments_grow_as_gradients_do(pair: str) -> None:
    """The gradients of the grown model's old entries are the small model's by the rule for first moments, but that in
    GPT-2 LayerNorm leaves a token's gradient along the all-ones direction of the stream open.
    """
    small, large = grown(pair)
    for model in (small, large):
        F.cross_entropy(model(tokens()).logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    first, second = ({n: power(p.grad) for n, p in small.named_parameters()} for power in (torch.clone, torch.square))
    moments = grow_moments(small, large, Moments(3, first, second), width="centred", depth="identity",
                           describe=describe)  # fmt: skip
    inherited = 0
    for name, parameter in large.named_parameters():
        known = moments.exp_avg[name] != 0
        inherited += bool(known.any())
        torch.testing.assert_close(moments.exp_avg_sq[name][known], moments.exp_avg[name][known] ** 2)
        found, wanted = parameter.grad, moments.exp_avg[name]
        if name.endswith(GPT2_WRITERS):  # their columns are the stream, of which the first 48 are old
            found, wanted = (x[..., :48] - x[..., :48].mean(-1, keepdim=True) for x in (found, wanted))
            known = known[..., :48]
        torch.testing.assert_close(found[known], wanted[known], rtol=1e-9, atol=1e-14)
    assert inherited > len(list(small.parameters())) * 0.9


@pytest.mark.parametrize("pair", ["llama tied", "gpt2 tied"])
def test_duplicate_keeps_a_tied_head(pair: str) -> None:
    kind = PAIRS[pair][0]["model_type"]
    small = exact(PAIRS[pair][0])
    wide = rotary(kind, 96, 3, 24, 4, 200) if kind == "llama" else gpt2(96, 3, 12)
    large = exact(wide | {"tie_word_embeddings": True}, 1)
    grow(small, large, width="duplicate", depth="identity", describe=describe)
    with torch.no_grad():
        assert relative_error(large(tokens()).logits, small(tokens()).logits) < 1e-12


@pytest.mark.parametrize("depth", ["identity", "stack", "interleave"])
def test_layers_come_from_where_the_operator_says(depth: str) -> None:
    small, large = grown("layers alone", depth=depth)
    sources = layer_sources(DEPTH_OPERATORS[depth], 2, 5, 1)
    for index, (layer, inert) in enumerate(sources):
        block, source = large.transformer.h[index], small.transformer.h[layer]
        assert torch.equal(block.attn.c_attn.weight, source.attn.c_attn.weight)
        closing = torch.zeros_like(source.mlp.c_proj.weight) if inert else source.mlp.c_proj.weight
        assert torch.equal(block.mlp.c_proj.weight, closing)


REFUSED = {
    "rope": (rotary("llama", 48, 2, 6, 2, 100), rotary("llama", 96, 2, 12, 4, 200, rope_theta=5e5)),
    "rms_norm_eps": (rotary("llama", 48, 2, 6, 2, 100), rotary("llama", 96, 2, 12, 4, 200, rms_norm_eps=1e-6)),
    "model_type": (rotary("llama", 48, 2, 6, 2, 100), rotary("qwen3", 96, 2, 12, 4, 200)),
    "tie_word_embeddings": (rotary("llama", 48, 2, 6, 2, 100, tie_word_embeddings=True),
                            rotary("llama", 96, 2, 12, 4, 200, tie_word_embeddings=False)),
    "group": (rotary("llama", 48, 2, 6, 2, 100), rotary("llama", 96, 2, 8, 8, 200)),
    "head_dim": (rotary("llama", 48, 2, 6, 2, 100), rotary("llama", 96, 2, 12, 4, 200, head_dim=16)),
    "vocab": (rotary("llama", 48, 2, 6, 2, 100), rotary("llama", 96, 2, 12, 4, 200, vocab_size=62)),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_models_of_another_kind_are_refused(what: str) -> None:
    small, large = (exact(config, trained=False) for config in REFUSED[what])
    with pytest.raises(GrowthError, match=what):
        grow(small, large, width="centred", depth="identity", describe=describe)
