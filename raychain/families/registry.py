"""The names a user may give a model, and the open_clip config behind each.

raychain's own families are the JSON files in `model_configs/`, in open_clip's format and added to open_clip's
registry when this module is imported, so open_clip itself builds them by name. Widths, depths, heads and embedding
sizes of `CoM-ViT-*` are those of the paper (Chain-of-Models Pre-Training, arXiv 2604.12391); open_clip's own
ViT-S/M/L-16 have other text towers, hence the prefix. `CoM-micro-*` are small enough to train on a CPU in
minutes.
"""

import difflib
import fnmatch
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import braceexpand
import open_clip
import timm

from raychain.families import micro_swin as micro_swin  # timm knows the model once this is imported

CONFIG_FOLDER = Path(__file__).parent / "model_configs"
_TIMM_PREFIX = "timm/"
_DOWNLOAD_PREFIXES = ("hf-hub:", "local-dir:", "timm/hf", "hf_hub:")

open_clip.add_model_config(CONFIG_FOLDER)


class UnknownModelError(ValueError):
    """A model name that cannot be built here: unknown, or one that would need a download."""


def model_names() -> list[str]:
    """Every name with a config that can be built here: raychain's families first, then open_clip's, in natural order.

    timm names (see `model_config`) are not in the list: `timm.list_models()` has them.
    """
    own = {path.stem for path in CONFIG_FOLDER.glob("*.json")}
    names = [name for name in open_clip.list_models() if refused(name, open_clip.get_model_config(name)) is None]
    return [name for name in names if name in own] + [name for name in names if name not in own]


def matching_models(patterns: Iterable[str]) -> list[str]:
    """The names that patterns with braces and globs stand for (`CoM-ViT-{T,S}-16`, `CoM-ViT-*`), each once, in order.

    A name without `*`, `?` or `[` is taken as it is. Raises UnknownModelError for a pattern that fits no name, and
    ValueError for braces that do not close.
    """
    found: list[str] = []
    for pattern in patterns:
        try:
            names = list(braceexpand.braceexpand(pattern))
        except ValueError:
            raise ValueError(f"{pattern!r} has braces that do not close") from None
        for name in names:
            hits = fnmatch.filter(model_names(), name) if any(c in name for c in "*?[") else [name]
            if not hits:
                raise UnknownModelError(f"{name!r} fits no model name. {_own_names(model_names())}")
            found += hits
    return list(dict.fromkeys(found))


def family_of(name: str) -> list[str]:
    """The models of raychain's family that `name` belongs to (`CoM-ViT-*-16`, …); none for other models."""
    own = [path.stem for path in CONFIG_FOLDER.glob("*.json")]
    prefix = "-".join(name.split("-")[:2]) + "-"
    return sorted(other for other in own if other.startswith(prefix)) if name in own else []


def model_config(name: str) -> dict[str, Any]:
    """The open_clip `model_cfg` of a model, as a copy the caller may change.

    `name` is a name of raychain's families, one of open_clip's, or an image model of timm's (`vit_small_patch16_224`,
    or `timm/vit_small_patch16_224`), which gets open_clip's default text tower (512 wide, 8 heads, 12 layers) and a
    linear projection to 512 dimensions.

    Raises UnknownModelError for any other name, and for models whose config or tokenizer open_clip would download.
    """
    if name.startswith(_DOWNLOAD_PREFIXES):
        raise UnknownModelError(
            f"unknown model {name!r}: this is an address of weights, not of an architecture. Give the architecture's "
            f"name, one of raychain.families.model_names(), for example 'CoM-ViT-T-16'."
        )
    config = open_clip.get_model_config(name)
    if config is None and (timm_name := name.removeprefix(_TIMM_PREFIX)) in _timm_names():
        config = _timm_config(timm_name)
    if config is None:
        raise UnknownModelError(_unknown(name))
    if (refusal := refused(name, config)) is not None:
        raise UnknownModelError(refusal)
    return dict(config)


def refused(name: str, config: dict[str, Any]) -> str | None:
    """Why the model of a `model_cfg` cannot be built here; None if it can. `name` is what the reason calls it."""
    text_name = config["text_cfg"].get("hf_model_name")
    if text_name:
        return (
            f"model {name!r} has a Hugging Face text tower ({text_name}), whose config must be downloaded. Models with "
            f"open_clip's own text tower are supported, for example 'CoM-ViT-T-16'."
        )
    tokenizer = config["text_cfg"].get("hf_tokenizer_name")
    if tokenizer:
        return (
            f"model {name!r} reads with a Hugging Face tokenizer ({tokenizer}), which must be downloaded. Models with "
            f"open_clip's own tokenizer are supported, for example 'CoM-ViT-T-16'."
        )
    if "multimodal_cfg" in config:
        return (
            f"model {name!r} is a CoCa model with a caption decoder; chains train contrastive models only, for example "
            f"'ViT-B-32'."
        )
    return None


@lru_cache(maxsize=1)
def _timm_names() -> frozenset[str]:
    return frozenset(timm.list_models())


def _timm_config(name: str) -> dict[str, Any]:
    pretrained = timm.get_pretrained_cfg(name, allow_unregistered=False)
    image_size = pretrained.input_size[-1] if pretrained else 224
    return {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": image_size,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    }


def _unknown(name: str) -> str:
    known = model_names()
    by_lower = {candidate.lower(): candidate for candidate in reversed([*known, *sorted(_timm_names())])}
    nearest = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    return f"unknown model {name!r}.{hint} {_own_names(known)}"


def _own_names(known: list[str]) -> str:
    own = ", ".join(candidate for candidate in known if candidate.startswith("CoM-"))
    return (
        f"Known: {own}, every name of open_clip.list_models() and every image model of timm.list_models(); "
        f"raychain.families.model_names() lists the first two."
    )
