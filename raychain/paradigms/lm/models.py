"""Language models: the configurations behind their names, and the models of transformers' that are built of them.

A configuration is what stands in transformers' `config.json`, without what has no part in the model. Models of three
types are trained: Llama, Qwen3 and GPT-2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from raychain.core.extras import language_library
from raychain.core.json import Json
from raychain.errors import InputError, nearest
from raychain.models import UnknownModelError
from raychain.models.building import initialised
from raychain.models.configs import read_json
from raychain.models.registry import transformers_config, transformers_names

FOLDER = Path(__file__).parent / "model_configs"


class Kind(NamedTuple):
    """A type of model: transformers' classes, and the keys of its configuration."""

    config: str
    model: str
    needed: tuple[str, ...]
    """Whole numbers that a configuration has to give."""
    optional: tuple[str, ...]
    """What else determines the model's function."""
    length: str
    """The key of the most tokens that the model reads at a time."""


_ROTARY = (
    ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_parameters", "vocab_size",
     "tie_word_embeddings", "attention_bias", "hidden_act", "initializer_range", "max_position_embeddings"),
)  # fmt: skip
KINDS = {
    "llama": Kind("LlamaConfig", "LlamaForCausalLM", _ROTARY[0], (*_ROTARY[1], "mlp_bias"), "max_position_embeddings"),
    "qwen3": Kind("Qwen3Config", "Qwen3ForCausalLM", *_ROTARY, "max_position_embeddings"),
    "gpt2": Kind(
        "GPT2Config", "GPT2LMHeadModel", ("n_embd", "n_layer", "n_head", "n_positions"),
        ("n_inner", "layer_norm_epsilon", "vocab_size", "tie_word_embeddings", "activation_function",
         "initializer_range", "scale_attn_by_inverse_layer_idx"),
        "n_positions",
    ),
}  # fmt: skip
SILENT = {
    *("architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "model_type", "n_ctx"),
    *("task_specific_params", "bos_token_id", "eos_token_id", "pad_token_id", "reorder_and_upcast_attn"),
    *("is_llama_config", "pretraining_tp", "rope_interleaved", "transformers.js_config", "max_window_layers"),
    *("_name_or_path", "keys_to_ignore_at_inference", "layer_types", "scale_attn_weights", "chunk_size_feed_forward"),
}  # fmt: skip
"""Keys of a `config.json` that have no part in what is trained here."""
OFF = frozenset({"sliding_window", "use_sliding_window", "rope_scaling", "add_cross_attention"})
"""Keys that may be there as long as they switch nothing on. Of dropout a model that grows here has none."""
_DROPS = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout")


def names() -> list[str]:
    """The names of all models that are known here."""
    return [*sorted(path.stem for path in FOLDER.glob("*.json")), *transformers_names()]


def configuration(name: str) -> Json:
    """The configuration of a model by its name; its vocabulary may be left to the tokeniser.

    A name is raychain's own, or one of a folder `models` of files NAME.json as transformers writes them. Raises
    UnknownModelError.
    """
    if (own := transformers_config(name)) is not None:
        return checked(own, name)
    path = FOLDER / f"{name}.json"
    if "/" in name or "\0" in name or not path.is_file():
        known = names()
        hint = nearest(name[:100], known, "give `models` a folder with its config.json as NAME.json")
        raise UnknownModelError(f"unknown language model {name[:100]!r}: {hint}. Known: {', '.join(known)}")
    return checked(read_json(path), name)


def checked(config: Mapping[str, Any], name: str) -> Json:
    """What determines the model in a configuration. Raises UnknownModelError for what cannot be trained here."""
    kind = KINDS.get(str(config.get("model_type")))
    if kind is None:
        raise UnknownModelError(f"{name} is of the type {config.get('model_type')!r}; known are {', '.join(KINDS)}")
    allowed = {*kind.needed, *kind.optional}
    for key, value in config.items():
        if key in allowed | SILENT or key in _DROPS or key.startswith("summary_") or value in (None, False, 0):
            continue
        problem = "which cannot be trained here" if key in OFF else f"which is not known for {config['model_type']}"
        raise UnknownModelError(f"{name} has {key}: {value}, {problem}")
    for key in (*kind.needed, "vocab_size", "num_key_value_heads", "head_dim"):
        value = config.get(key)
        if (value is None and key in kind.needed) or not (value is None or (type(value) is int and 0 < value < 2**24)):
            raise UnknownModelError(f"{name} has {key}: {value}; it has to be a whole number above zero")
    return {"model_type": config["model_type"]} | {
        key: config[key] for key in sorted(allowed) if config.get(key) is not None
    }


def longest(config: Mapping[str, Any]) -> int:
    """The most tokens that the model reads at a time."""
    return int(config.get(KINDS[config["model_type"]].length, 2048))


@lru_cache(maxsize=256)
def _library_config(config: str) -> Any:
    given = json.loads(config)
    kind = KINDS[given["model_type"]]
    if given["model_type"] == "gpt2":
        given |= dict.fromkeys(_DROPS[:3], 0.0)
    try:
        made = getattr(language_library("transformers"), kind.config)(**given, bos_token_id=None, eos_token_id=None)
    except InputError:
        raise
    except Exception as error:  # transformers' own checks, each with an error of its own
        raise ValueError(str(error).strip().rpartition("ValueError: ")[2]) from None
    made._attn_implementation = "sdpa"
    return made


def library_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration, a copy. Raises ValueError where it takes none such."""
    return deepcopy(_library_config(json.dumps(config, sort_keys=True)))


def build(config: Mapping[str, Any], *, seed: int, device: str | torch.device = "cpu") -> Any:
    """The model in fp32 with random weights that follow from the seed, drawn as GPT-2's are: normal with
    `initializer_range`, and in GPT-2 smaller by √(2 · layers) where a residual branch ends.

    Raises ValueError for a configuration that makes no model.
    """
    made = library_config(config)
    kind = getattr(language_library("transformers"), KINDS[config["model_type"]].model)
    model = initialised(lambda: kind(made), seed=seed, device="meta")
    if torch.device(device).type == "meta":
        return model
    model = model.to_empty(device="cpu")
    model.tie_weights()
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is not None:  # its frequencies are no parameters, and are lost on the meta device
        model.base_model.rotary_emb = type(rotary)(made)
    _draw(model, made, seed)
    return model.to(device)


@torch.no_grad()
def _draw(model: nn.Module, made: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    branch = 1 / math.sqrt(2 * made.num_hidden_layers) if made.model_type == "gpt2" else 1.0
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            std = made.initializer_range * (branch if name.endswith("c_proj.weight") else 1.0)
            parameter.normal_(0, std, generator=generator)
        else:
            parameter.fill_(float(name.endswith("weight")))
