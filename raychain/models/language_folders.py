"""Folders of transformers' language models: telling them apart, and what they say of their tokeniser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from raychain.core.extras import language_library
from raychain.core.json import Json
from raychain.data.tokens import END, FILE, Tokenizer, read_tokenizer
from raychain.models.checkpoints import CheckpointError

CONFIG, WEIGHTS, TOKENIZER_CONFIG = "config.json", "model.safetensors", "tokenizer_config.json"
FILES = (CONFIG, WEIGHTS, FILE, TOKENIZER_CONFIG)
KINDS = ("llama", "qwen3", "gpt2")


class LanguageFolder(NamedTuple):
    """A language model in fp32 on the CPU, with its tokeniser."""

    model: Any
    config: Json
    """The content of its config.json."""
    tokenizer: Tokenizer
    length: int
    """Tokens that it was trained to read at a time."""


def is_language(path: Path) -> bool:
    """Whether a path is the folder of a language model that is known here."""
    return _json(path / CONFIG).get("model_type") in KINDS if (path / CONFIG).is_file() else False


def load_language(path: Path) -> Any:
    """The model of a folder, as transformers loads it, in fp32 on the CPU."""
    library = language_library("transformers")
    options = {"dtype": torch.float32, "local_files_only": True, "attn_implementation": "sdpa"}
    return library.AutoModelForCausalLM.from_pretrained(path, **options)


def read_language(path: Path) -> LanguageFolder:
    """What a folder holds. Raises CheckpointError for files that are missing, InputError for a wrong tokeniser."""
    if missing := [name for name in (CONFIG, WEIGHTS, FILE) if not (path / name).is_file()]:
        raise CheckpointError(f"it lacks {missing[0]}")
    config, described = _json(path / CONFIG), _json(path / TOKENIZER_CONFIG)
    end = described.get("eos_token") or END
    tokenizer = read_tokenizer(str(path), end if isinstance(end, str) else str(end.get("content")), "CHECKPOINT")
    most = config.get("n_positions") or config.get("max_position_embeddings") or 1024
    return LanguageFolder(
        load_language(path), config, tokenizer, min(int(most), int(described.get("model_max_length") or most))
    )


def _json(path: Path) -> Json:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
