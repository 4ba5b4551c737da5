"""What an open_clip `model_cfg` may hold, checked before anything is built, so that a wrong one is one sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import open_clip
import timm
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from raychain.core.json import Json

ModelConfig = Json
"""An open_clip `model_cfg`, whose keys are those of open_clip's dataclasses."""

LARGEST_FILE = 2**20
"""Bytes of the largest file that is read as a config; open_clip's own have less than a thousand."""
_LARGEST_NUMBER = 2**20
_RANGES = {
    "embed_dim": (1, 2**16),
    "width": (1, 2**16),
    "head_width": (1, 2**16),
    "heads": (1, 2**12),
    "layers": (1, 2**9),
    "patch_size": (1, 2**12),
    "image_size": (1, 2**12),
    "size": (1, 2**12),
    "context_length": (2, 2**13),
    "vocab_size": (1, 2**20),
}
"""What bounds time and memory: beyond any model that is trained, and far from what a machine can hold."""
_TOKENIZER = {"clean": str, "additional_special_tokens": list}
_CLEANERS = ("canonicalize", "lower", "whitespace")


class ConfigError(ValueError):
    """A config that is none of open_clip's: which key is wrong, and how."""


def read_json(path: Path) -> Any:
    """The content of a small JSON file. Raises ConfigError, which does not repeat the path."""
    try:
        if not path.is_file():
            raise ConfigError("is no regular file")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot be read: {error}") from None
    if len(content) > LARGEST_FILE:
        raise ConfigError(f"is larger than {LARGEST_FILE:,} bytes, which no model config is")
    try:
        return json.loads(content, parse_constant=_no_number, object_pairs_hook=_once)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"is not JSON: {error}") from None


def check_config(config: Any) -> None:
    """Whether `config` has the keys and types of an open_clip `model_cfg`, of sizes that can be built.

    Whether a model comes of it only building tells. Raises ConfigError.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"the model config is {_kind(config)}, not an object with keys")
    if missing := [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]:
        raise ConfigError(f"the model config has no {missing[0]}")
    _check_types(_schema(), config)
    _check_ranges(config, "")
    vision, text = config["vision_cfg"], config["text_cfg"]
    name = vision.get("timm_model_name")
    if name and (":" in name or "/" in name or not timm.is_model(name)):
        raise ConfigError(f"vision_cfg.timm_model_name: timm {timm.__version__} has no model {name!r} of its own")
    _check_tokenizer(text.get("tokenizer_kwargs") or {})


def check_preprocessing(preprocessing: Any) -> None:
    """Whether `preprocessing` is an open_clip `preprocess_cfg` for RGB pictures; raises ConfigError."""
    if not isinstance(preprocessing, Mapping):
        raise ConfigError(f"preprocess_cfg is {_kind(preprocessing)}, not an object with keys")
    given = {key: value for key, value in preprocessing.items() if value is not None}
    _check_types(_preprocessing_schema(), given, "preprocess_cfg")
    _check_ranges(given, "preprocess_cfg.")
    for key in ("mean", "std"):
        if key in given and len(given[key]) != 3:
            raise ConfigError(f"preprocess_cfg.{key}: {len(given[key])} numbers, not one for each of red, green, blue")
    if any(value <= 0 for value in given.get("std", ())):
        raise ConfigError("preprocess_cfg.std: a number that is not above zero")
    if given.get("mode", "RGB") != "RGB":
        raise ConfigError(f"preprocess_cfg.mode: {given['mode']!r}, and only 'RGB' is supported")


def _no_number(text: str) -> NoReturn:
    raise ConfigError(f"holds {text}, which is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> ModelConfig:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ConfigError(f"holds the key {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _check_types(schema: type[BaseModel], values: Mapping[str, Any], within: str = "") -> None:
    try:
        text = json.dumps(dict(values), allow_nan=False)
        schema.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        parts = [str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
        where = ".".join(([within] if within else []) + parts)
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{where}: a key that open_clip {open_clip.__version__} does not know") from None
        given = _short(first["input"])
        raise ConfigError(f"{where}: {given} given, {first['msg'].replace('Input ', '', 1)}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the config holds more than plain numbers and text: {error}") from None


def _check_ranges(values: Mapping[str, Any], within: str) -> None:
    for key, number in _numbers(values):
        low, high = _RANGES.get(key.rpartition(".")[2], (-_LARGEST_NUMBER, _LARGEST_NUMBER))
        if not low <= number <= high:
            raise ConfigError(f"{within}{key}: {_short(number)} given, {low:,} to {high:,} allowed")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number below `value` with the name of its key; those of a list have the list's."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def _check_tokenizer(options: Mapping[str, Any]) -> None:
    where = "text_cfg.tokenizer_kwargs"
    for key, value in options.items():
        if key not in _TOKENIZER or not isinstance(value, _TOKENIZER[key]):
            raise ConfigError(f"{where}.{key}: {_short(value)} given, and only {', '.join(_TOKENIZER)} are supported")
    if options.get("clean", "lower") not in _CLEANERS:
        raise ConfigError(f"{where}.clean: {_short(options['clean'])} given, {', '.join(_CLEANERS)} allowed")
    if not all(isinstance(token, str) and token for token in options.get("additional_special_tokens", ())):
        raise ConfigError(f"{where}.additional_special_tokens: something that is no text")


@lru_cache(maxsize=1)
def _schema() -> type[BaseModel]:
    """The schema of a model_cfg, from open_clip's own classes, whose hints leave out where its own files hold null."""
    fields: dict[str, Any] = {
        "embed_dim": (int, ...),
        "vision_cfg": (_of(CLIPVisionCfg, patch_size=int | None, timm_proj=str | None), ...),
        "text_cfg": (_of(CLIPTextCfg, act_kwargs=dict | None, norm_kwargs=dict | None), ...),
        "custom_text": (bool, False),
        "quick_gelu": (bool, False),
        "init_logit_scale": (float, 0.0),
        "init_logit_bias": (float | None, None),
        "nonscalar_logit_scale": (bool, False),
        "output_dict": (bool, False),
    }
    return create_model("model_cfg", __config__=_STRICT, **fields)


@lru_cache(maxsize=1)
def _preprocessing_schema() -> type[BaseModel]:
    return _of(PreprocessCfg)


_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _of(cls: type, **instead: Any) -> type[BaseModel]:
    """A schema with the keys and types of one of open_clip's dataclasses, those `instead` excepted."""
    hints = get_type_hints(cls) | instead
    fields: dict[str, Any] = {field.name: (hints[field.name], None) for field in dataclasses.fields(cls)}
    return create_model(cls.__name__, __config__=_STRICT, **fields)


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", bool: "true or false"}.get(type(value), _short(value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
