"""The names a user may give a model, and the open_clip config behind each.

raychain's own families are the JSON files in `model_configs/`, in open_clip's format and added to open_clip's
registry when this module is imported, so open_clip itself builds them by name. Widths, depths, heads and embedding
sizes of `CoM-ViT-*` are those of the paper (Chain-of-Models Pre-Training, arXiv 2604.12391); open_clip's own
ViT-S/M/L-16 have other text towers, hence the prefix. `CoM-micro-*` are small enough to train on a CPU in
minutes.

A user's own models come from a folder of such files (`use_models`) or are in open_clip's registry already
(`open_clip.add_model_config`). Names mean something in the process that registered them alone: what is sent to other
processes is the config.
"""

import contextlib
import difflib
import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import braceexpand
import open_clip
import timm

from raychain.core.braces import count_alternatives
from raychain.core.json import Json
from raychain.errors import InputError
from raychain.models import micro_swin as micro_swin  # timm knows the model once this is imported
from raychain.models.configs import ConfigError, ModelConfig, check_config, read_json

CONFIG_FOLDER = Path(__file__).parent / "model_configs"
_TIMM_PREFIX = "timm/"
_DOWNLOAD_PREFIXES = ("hf-hub:", "local-dir:", "timm/hf", "hf_hub:")
_SHIPPED = (CONFIG_FOLDER, Path(open_clip.__file__).parent / "model_configs")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What a user's own model may be called: it becomes part of folders' names, and patterns and lists hold it."""
_MOST_NAMES = 10_000
_users: dict[str, ModelConfig] = {}
"""The configs of the folder that `use_models` read last."""
_transformers: dict[str, Json] = {}
"""Those among its files that are transformers' `config.json` of a language model."""

open_clip.add_model_config(CONFIG_FOLDER)


class UnknownModelError(ValueError):
    """A model name that cannot be built here: unknown, or one that would need a download."""


def use_models(source: str | Path | None, where: str = "models") -> None:
    """Makes the models of a folder of open_clip's JSON configs known by their files' names, in place of those of the
    last call; None: of no folder.

    `source` may be one file too, as for `open_clip.add_model_config`. A file with a `model_type` is a language model's,
    as transformers writes it. Raises InputError, which names `where` it was given, for a file that is no such config,
    and for a name that stands for another model already.
    """
    found: dict[str, ModelConfig] = {}
    for path in _config_files(source, where) if source is not None else ():
        try:
            found[path.stem] = _read_config(path)
        except ConfigError as error:
            allowed = "a folder of open_clip model configs: NAME.json with embed_dim, vision_cfg and text_cfg"
            raise InputError(where, path, allowed, f"correct, rename or remove the file: it {error}") from None
    for known in (_users, _transformers):
        known.clear()
    _transformers.update({name: config for name, config in found.items() if "model_type" in config})
    _users.update({name: config for name, config in found.items() if "model_type" not in config})


def transformers_config(name: str) -> Json | None:
    """The user's `config.json` of a language model of that name; None where there is none."""
    return deepcopy(_transformers.get(name))


def transformers_names() -> list[str]:
    """The names of the user's language models."""
    return list(_transformers)


def add_transformers(config: Json, called: str) -> None:
    """Makes a language model's `config.json` known as `called` until `use_models` is called."""
    _transformers[called] = deepcopy(config)


def own_configs(names: Iterable[str]) -> dict[str, ModelConfig]:
    """Configs by name, out of known names, of those that the user or a package of the user's has brought along."""
    found: dict[str, ModelConfig] = {}
    for name in names:
        if name in _transformers:
            found[name] = deepcopy(_transformers[name])
        elif _known(name) is None and name.removeprefix(_TIMM_PREFIX) not in _timm_names():
            with contextlib.suppress(UnknownModelError):  # a paradigm's own
                found[name] = model_config(name)
    return found


def difference(config: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first key in which two `model_cfg` are of different models, with both values; empty where they are of the
    same. Image sizes and initial values do not count, nor whether timm's weights would be downloaded.
    """
    for key in sorted({*config, *other} - {"preprocess_cfg", "init_logit_scale"}):
        ours, theirs = (found.get(key) for found in (config, other))
        if key == "init_logit_bias" and (ours is None) == (theirs is None):
            continue
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            for name in sorted({*ours, *theirs} - {"image_size", "timm_model_pretrained"}):
                if ours.get(name) != theirs.get(name):
                    return f"{key}.{name} is {ours.get(name)}, not {theirs.get(name)}"
        elif ours != theirs:
            return f"{key} is {ours}, not {theirs}"
    return ""


def name_for(config: Json, called: str, lookup: Callable[[str], Mapping[str, Any]]) -> str:
    """A name for the model of a checkpoint's `model_cfg`: one that is known for it, of which `called` comes first, else
    one made of `called`, by which the config is known until `use_models` is called. `lookup` has the config of a name.
    """
    for name in (called, *model_names()):
        with contextlib.suppress(UnknownModelError):
            if not difference(lookup(name), config):
                return name
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", called).lstrip("._-")[:80] or "checkpoint"
    name, number = plain, 1
    while _is_taken(name):
        number += 1
        name = f"{plain}-{number}"
    _users[name] = deepcopy(config)
    return name


def add_model(config: ModelConfig, called: str) -> str:
    """Makes a config that was made here known until `use_models` is called: as one of raychain's families or the user's
    folder that is the same, else as `called`. Returns the name. Raises ConfigError where that is another model's.
    """
    known = {path.stem: _known(path.stem) for path in sorted(CONFIG_FOLDER.glob("*.json"))} | _users
    if same := [name for name in (called, *known) if known.get(name) == config]:
        return same[0]
    if _is_taken(called):
        raise ConfigError(f"{called} stands for another model already")
    _users[called] = deepcopy(config)
    return called


def _is_taken(name: str) -> bool:
    try:
        return bool(model_config(name))
    except UnknownModelError:
        return False


def _config_files(source: str | Path, where: str) -> list[Path]:
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return [path]
        files = sorted(file for file in path.iterdir() if file.suffix == ".json" and not file.name.startswith("."))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(where, source, f"a folder of open_clip's JSON configs on this machine ({error})",
                         "give another folder") from None  # fmt: skip
    if not files:
        raise InputError(where, source, "a folder with open_clip's JSON configs: NAME.json", "give another folder")
    return files


def _read_config(path: Path) -> ModelConfig:
    """The config in a file of a user's folder. Raises ConfigError, to be read after "it"."""
    name, config = path.stem, read_json(path)
    if _NAME.fullmatch(name) is None:
        raise ConfigError("has a name that is no model's: letters, digits, dots, dashes and underscores")
    if isinstance(config, dict) and isinstance(config.get("model_type"), str):
        return config
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        raise ConfigError("is no config of a model: it lacks embed_dim, vision_cfg or text_cfg")
    if refused(name, config) is None:
        try:
            check_config(config)
        except ConfigError as error:
            raise ConfigError(f"is no config that can be built: {error}") from None
    known = _known(name) or (_timm_config(name) if name in _timm_names() else None)
    if known is not None and known != config:
        raise ConfigError(f"has a name that stands for another model already: {name}")
    return config


def _known(name: str) -> ModelConfig | None:
    """The config of a name of raychain's or open_clip's own, whatever has been registered under it since."""
    if "/" in name or "\0" in name:
        return None
    for folder in _SHIPPED:
        if (path := folder / f"{name}.json").is_file():
            config: ModelConfig = read_json(path)
            return config
    return None


def model_names() -> list[str]:
    """Every name with a config that can be built here, in natural order: raychain's families first, then those of the
    user's folder, then those in open_clip's registry.

    timm names (see `model_config`) are not in the list: `timm.list_models()` has them.
    """
    own = {path.stem for path in CONFIG_FOLDER.glob("*.json")}
    names = [name for name in open_clip.list_models() if refused(name, open_clip.get_model_config(name)) is None]
    users = [name for name, config in _users.items() if refused(name, config) is None]
    return list(dict.fromkeys([*(name for name in names if name in own), *users, *names]))


def matching_models(patterns: Iterable[str], known: Collection[str] | None = None) -> list[str]:
    """The names that patterns with braces and globs stand for (`CoM-ViT-{T,S}-16`, `CoM-ViT-*`), each once, in order.
    Globs fit names of `known`; absent: of `model_names`.

    A name without `*`, `?` or `[` is taken as it is. Raises UnknownModelError for a pattern that fits no name, and
    ValueError for braces that do not close.
    """
    found: list[str] = []
    known = model_names() if known is None else known
    for pattern in patterns:
        try:
            many = count_alternatives(pattern) > _MOST_NAMES
            names = [] if many else list(braceexpand.braceexpand(pattern))
        except (ValueError, RecursionError):
            raise ValueError(f"{pattern!r} has braces that do not close") from None
        if many:
            raise UnknownModelError(f"{pattern!r} stands for more than {_MOST_NAMES:,} names")
        for name in names:
            hits = fnmatch.filter(known, name) if any(c in name for c in "*?[") else [name]
            if not hits:
                some = ", ".join(list(known)[:5])
                raise UnknownModelError(f"{name!r} fits no model name of {len(known):,}, such as {some}")
            found += hits
    return list(dict.fromkeys(found))


def family_of(name: str) -> list[str]:
    """The models of raychain's family that `name` belongs to (`CoM-ViT-*-16`, …); none for other models."""
    own = [path.stem for path in CONFIG_FOLDER.glob("*.json")]
    prefix = "-".join(name.split("-")[:2]) + "-"
    return sorted(other for other in own if other.startswith(prefix)) if name in own else []


def model_config(name: str) -> ModelConfig:
    """The open_clip `model_cfg` of a model, as a copy the caller may change.

    `name` is a name of raychain's families, one of the user's folder (`use_models`), one in open_clip's registry, or an
    image model of timm's (`vit_small_patch16_224`, or `timm/vit_small_patch16_224`), which gets open_clip's default
    text tower (512 wide, 8 heads, 12 layers) and a linear projection to 512 dimensions.

    Raises UnknownModelError for any other name, for models whose config or tokenizer open_clip would download, and for
    configs that are none of open_clip's.
    """
    if name.startswith(_DOWNLOAD_PREFIXES):
        raise UnknownModelError(
            f"unknown model {name!r}: this is an address of weights, not of an architecture. Give the architecture's "
            f"name, one of raychain.models.model_names(), for example 'CoM-ViT-T-16'."
        )
    config = deepcopy(_users[name]) if name in _users else open_clip.get_model_config(name)
    if config is None and (timm_name := name.removeprefix(_TIMM_PREFIX)) in _timm_names():
        config = _timm_config(timm_name)
    if config is None:
        raise UnknownModelError(_unknown(name))
    if (refusal := refused(name, config)) is not None:
        raise UnknownModelError(refusal)
    try:
        check_config(config)
    except ConfigError as error:
        raise UnknownModelError(f"model {name!r} cannot be built: {error}") from None
    if config["vision_cfg"].get("timm_model_pretrained"):
        raise UnknownModelError(f"model {name!r} asks for pretrained weights, which would be downloaded: give its "
                                f"config timm_model_pretrained: false.")  # fmt: skip
    if (known := _known(name)) is not None and known != config:
        raise UnknownModelError(f"model {name!r} was registered with another config than the {name} that is known by "
                                f"this name: give your model another name.")  # fmt: skip
    return dict(config)


def native_size(config: Mapping[str, Any]) -> int:
    """Pixels a side of the pictures a `model_cfg` is for."""
    size = config["vision_cfg"].get("image_size", 224)
    return int(size if isinstance(size, int) else size[0])


def refused(name: str, config: ModelConfig) -> str | None:
    """Why the model of a `model_cfg` cannot be built here; None if it can. `name` is what the reason calls it."""
    text, vision = (config[tower] if isinstance(config[tower], dict) else {} for tower in ("text_cfg", "vision_cfg"))
    example = "for example 'CoM-ViT-T-16'"
    if text.get("hf_model_name"):
        return (
            f"model {name!r} has a Hugging Face text tower ({text['hf_model_name']}), whose config must be downloaded. "
            f"Models with open_clip's own text tower are supported, {example}."
        )
    if text.get("hf_tokenizer_name"):
        return (
            f"model {name!r} reads with a Hugging Face tokenizer ({text['hf_tokenizer_name']}), which must be "
            f"downloaded. Models with open_clip's own tokenizer are supported, {example}."
        )
    if "multimodal_cfg" in config:
        return (
            f"model {name!r} is a CoCa model with a caption decoder; chains train contrastive models only, for example "
            f"'ViT-B-32'."
        )
    match vision.get("image_size", 224):
        case [int() as height, int() as width] if height != width:
            shown = f"{height} × {width} pixels"
            return f"model {name!r} is for pictures of {shown}; raychain prepares square ones, {example}."
    return None


@lru_cache(maxsize=1)
def _timm_names() -> frozenset[str]:
    return frozenset(timm.list_models())


def _timm_config(name: str) -> ModelConfig:
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
    if len(name) > 200:  # looking for near ones would take minutes
        return f"unknown model {name[:50] + '...'!r}. {_own_names(known)}"
    nearest = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    return f"unknown model {name!r}.{hint} {_own_names(known)}"


def _own_names(known: list[str]) -> str:
    own = ", ".join(candidate for candidate in known if candidate.startswith("CoM-"))
    return (
        f"Known: {own}, every name of open_clip.list_models() and every image model of timm.list_models(); "
        f"raychain.models.model_names() lists the first two. "
        f"--models FOLDER, or `models:` in the experiment, adds configs of your own."
    )
