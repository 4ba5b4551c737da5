"""Language models described by axes, which growth follows: Llama, Qwen3 (RMSNorm, grouped queries, SwiGLU), GPT-2."""

from __future__ import annotations

from typing import Any

from raychain.models.architectures import ModelDescription
from raychain.models.axes import Tower, TowerBuilder, UndescribedError

KIND = "language model"


def describe(model: Any) -> ModelDescription:
    """The axes of every parameter of a model of transformers'. Raises UndescribedError for other models."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    tensors = dict(model.state_dict())
    tied = bool(getattr(model.config, "tie_word_embeddings", False)) if kind else False
    if tied:
        tensors.pop("lm_head.weight", None)
    tower = TowerBuilder("decoder", KIND, "", tensors)
    tower.constants["model_type"] = kind
    tower.constants["tie_word_embeddings"] = tied
    if kind in ("llama", "qwen3"):
        return ModelDescription({"decoder": _rotary(tower, model, tied)}, ())
    if kind == "gpt2":
        return ModelDescription({"decoder": _gpt2(tower, model, tied)}, ())
    name = type(model).__name__
    raise UndescribedError(name, f"{name} is no Llama, Qwen3 or GPT-2 model of transformers")


def _rotary(tower: TowerBuilder, model: Any, tied: bool) -> Tower:
    """Query head h reads the key and the value of head h // group, so heads are kv × group."""
    config = model.config
    attention, heads, kv = model.model.layers[0].self_attn, config.num_attention_heads, config.num_key_value_heads
    tower.constants |= {"rms_norm_eps": config.rms_norm_eps, "hidden_act": config.hidden_act,
                        "rope": str(sorted((config.rope_parameters or {}).items()))}  # fmt: skip
    tower.space("vocab", config.vocab_size, "fixed")
    tower.space("embed", config.hidden_size, "stream", centred=False)
    tower.space("kv", kv, "units")
    tower.space("group", heads // kv, "units")
    tower.space("head_dim", attention.head_dim, "fixed")
    tower.space("mlp", config.intermediate_size, "units")
    tower.stack("layers", config.num_hidden_layers)
    tower.add("model.embed_tokens.weight", "vocab >embed", "weight")
    for index in range(config.num_hidden_layers):
        _add_rotary_layer(tower, ("layers", index))
    tower.add("model.norm.weight", "embed", "gain", before_tied=tied)
    tower.add("lm_head.weight", "vocab <embed", "weight")
    return tower.finish()


def _add_rotary_layer(tower: TowerBuilder, layer: tuple[str, int]) -> None:
    block = "model.layers.{}."
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tower.add(f"{block}{norm}.weight", "embed", "gain", layer=layer)
    for part, rows in (("q", "(>kv >group head_dim)"), ("k", "(>kv head_dim)"), ("v", "(>kv head_dim)")):
        tower.add(f"{block}self_attn.{part}_proj.weight", f"{rows} <embed", "weight", layer=layer)
        tower.add(f"{block}self_attn.{part}_proj.bias", rows, "bias", layer=layer)
    for norm in ("q_norm", "k_norm"):
        tower.add(f"{block}self_attn.{norm}.weight", "head_dim", "gain", layer=layer)
    tower.add_branch_end(f"{block}self_attn.o_proj", "embed", "(<kv <group head_dim)", layer=layer, scale="")
    for part in ("gate", "up"):
        tower.add(f"{block}mlp.{part}_proj.weight", ">mlp <embed", "weight", layer=layer)
        tower.add(f"{block}mlp.{part}_proj.bias", ">mlp", "bias", layer=layer)
    tower.add_branch_end(f"{block}mlp.down_proj", "embed", "<mlp", layer=layer, scale="")


def _gpt2(tower: TowerBuilder, model: Any, tied: bool) -> Tower:
    """GPT-2's matrices have their input side first."""
    config = model.config
    tower.constants |= {"layer_norm_epsilon": config.layer_norm_epsilon, "activation": config.activation_function}
    for name, size in (("vocab", config.vocab_size), ("position", config.n_positions), ("qkv", 3)):
        tower.space(name, size, "fixed")
    tower.space("embed", config.n_embd, "stream")
    tower.space("heads", config.n_head, "units")
    tower.space("head_dim", config.n_embd // config.n_head, "fixed")
    tower.space("mlp", config.n_inner or 4 * config.n_embd, "units")
    tower.stack("layers", config.n_layer)
    tower.add("transformer.wte.weight", "vocab >embed", "weight")
    tower.add("transformer.wpe.weight", "position >embed", "weight")
    block = "transformer.h.{}."
    for index in range(config.n_layer):
        layer = ("layers", index)
        for norm in ("ln_1", "ln_2"):
            tower.add(f"{block}{norm}.weight", "embed", "gain", layer=layer)
            tower.add(f"{block}{norm}.bias", "embed", "shift", layer=layer)
        tower.add(f"{block}attn.c_attn.weight", "<embed (qkv >heads head_dim)", "weight", layer=layer)
        tower.add(f"{block}attn.c_attn.bias", "(qkv >heads head_dim)", "bias", layer=layer)
        tower.add(f"{block}mlp.c_fc.weight", "<embed >mlp", "weight", layer=layer)
        tower.add(f"{block}mlp.c_fc.bias", ">mlp", "bias", layer=layer)
        for end, reads in (("attn.c_proj", "(<heads head_dim)"), ("mlp.c_proj", "<mlp")):
            tower.add(f"{block}{end}.weight", f"{reads} >embed", "weight", layer=layer, closes=True)
            tower.add(f"{block}{end}.bias", ">embed", "bias", layer=layer, closes=True)
    tower.add("transformer.ln_f.weight", "embed", "gain", before_tied=tied)
    tower.add("transformer.ln_f.bias", "embed", "shift", before_tied=tied)
    tower.add("lm_head.weight", "vocab <embed", "weight")
    return tower.finish()
