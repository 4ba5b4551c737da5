"""Building a model of a family with random weights: no download, no trace in the caller's random state."""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, TypeVar, cast

import timm
import torch
from open_clip.model import (
    CLIP,
    CustomTextCLIP,
    get_model_preprocess_cfg,
    resize_pos_embed,
    set_model_preprocess_cfg,
)
from open_clip.transform import PreprocessCfg
from torch import nn
from torch.overrides import TorchFunctionMode

from raychain.core.json import Json
from raychain.models.configs import ModelConfig
from raychain.models.registry import model_config

Module = TypeVar("Module", bound=nn.Module)
NORMALISATION: dict[str, tuple[float, ...]] = {"mean": PreprocessCfg().mean, "std": PreprocessCfg().std}
"""How a model's pictures are normalised where nothing else is said."""


class UnbuildableError(ValueError):
    """A config that open_clip cannot make a model of, or none that takes pictures and captions as chains do."""


def build(
    name: str, *, seed: int, image_size: int | None = None, device: str | torch.device = "cpu"
) -> CLIP | CustomTextCLIP:
    """A freshly initialised fp32 open_clip model.

    The same name, image size and seed give the same weights on every device (they are drawn on the CPU and moved).
    The global random state is neither used nor changed, so another thread may train meanwhile. `image_size` (pixels)
    replaces the config's. On `device="meta"` nothing is allocated and `seed` means nothing: shapes only, in well
    under a second.

    Raises UnknownModelError (see `model_config`), and ValueError where the image size does not fit the image tower or
    open_clip can build no such model.
    """
    return build_config(model_config(name), seed=seed, image_size=image_size, device=device)


def build_config(
    config: ModelConfig, *, seed: int, image_size: int | None = None, device: str | torch.device = "cpu"
) -> CLIP | CustomTextCLIP:
    """`build` for a `model_cfg` without a registered name, such as the one in a checkpoint's open_clip_config.json.

    It may have a `preprocess_cfg` with a `mean` and `std` of its own. Nothing is downloaded, whatever the config asks
    for. Raises ValueError as `build` does.
    """
    config = _with_image_size(config, image_size)
    custom_text, preprocessing = config.pop("custom_text", False), config.pop("preprocess_cfg", {})
    model_class = CustomTextCLIP if custom_text else CLIP
    try:
        model: CLIP | CustomTextCLIP = initialised(lambda: model_class(**config), seed=seed, device=device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever open_clip and timm raise over a config of which no model can be made
        raise UnbuildableError(f"open_clip cannot build it: {_said(error)}") from error
    set_model_preprocess_cfg(model, {**vars(PreprocessCfg()), **preprocessing, "size": model.visual.image_size})
    return model


def encode_one(model: Any, tower: Literal["image", "text"], embed_dim: int) -> None:
    """Runs one picture or caption of the model's own size, of values without meaning, through a tower.

    Raises UnbuildableError unless it becomes one vector of `embed_dim` numbers. On the meta device nothing is computed.
    """
    device = model.logit_scale.device
    try:
        if tower == "image":
            features = model.encode_image(torch.empty(1, 3, *_height_width(model), device=device))
        else:
            features = model.encode_text(torch.zeros(1, model.context_length, dtype=torch.long, device=device))
    except Exception as error:  # as above: architectures that take other inputs, or whose head does not fit
        raise UnbuildableError(f"its {tower} tower cannot be run as open_clip builds it: {_said(error)}") from error
    if not isinstance(features, torch.Tensor) or features.shape != (1, embed_dim):
        shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise UnbuildableError(f"its {tower} tower gives {shape} and not one vector of {embed_dim} numbers")


def at_image_size(model: nn.Module, config: ModelConfig, image_size: int) -> nn.Module:
    """The model of `config` for pictures of `image_size` pixels: itself, or a copy on its device whose position
    embeddings are interpolated (bicubic, as open_clip loads checkpoints of another resolution).

    Raises ValueError where the image size does not fit the image tower, or it has other position embeddings.
    """
    clip: Any = model
    if _height_width(clip) == (image_size, image_size):
        return model
    state = dict(model.state_dict())
    resized: Any = build_config(config, seed=0, image_size=image_size, device=clip.logit_scale.device)
    resize_pos_embed(state, resized)
    try:
        resized.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"its weights cannot be brought to {image_size} pixels: {_said(error)}") from None
    preprocessing = get_model_preprocess_cfg(clip)
    set_model_preprocess_cfg(resized, {**preprocessing, "size": resized.visual.image_size})
    return resized


def preprocessing_of(model: nn.Module) -> Json:
    """open_clip's `preprocess_cfg` of a model: size, mean and std of its pictures, interpolation."""
    return dict(cast(Any, model.visual).preprocess_cfg)


def _height_width(clip: Any) -> tuple[int, int]:
    size = clip.visual.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _said(error: Exception) -> str:
    """The error's kind and the beginning of what it says, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


def parameter_count(name: str) -> int:
    """The number of parameters of both towers and the logit scale, counted without allocating them.

    Raises as `build` does.
    """
    return _parameter_count(json.dumps(model_config(name)))


@lru_cache(maxsize=64)
def _parameter_count(config: str) -> int:
    """By the content of a config: its name may come to mean another one."""
    model: nn.Module = build_config(json.loads(config), seed=0, device="meta")
    return sum(parameter.numel() for parameter in model.parameters())


def initialised(make: Callable[[], Module], *, seed: int, device: str | torch.device = "cpu") -> Module:
    """The module that `make` builds, with random weights that follow from the seed alone, on `device`.

    The process's random state is neither used nor changed, so another thread may train meanwhile. On `device="meta"`
    there are shapes only.
    """
    device = torch.device(device)
    on_meta = device.type == "meta"
    with _Shapes() if on_meta else _Seeded(seed), torch.device("meta" if on_meta else "cpu"):
        module = make()
    return module if on_meta else module.to(device)


class _Shapes(TorchFunctionMode):
    """Initialisers of this thread change nothing: on the meta device there are no values, and some take a second."""

    _FREE: frozenset[Callable[..., Any]] = frozenset(
        getattr(torch.Tensor, name) for name in ("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_")
    )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func in self._FREE else func(*args, **(kwargs or {}))


class _Seeded(TorchFunctionMode):
    """Random functions of this thread draw from a generator of their own instead of the process's.

    Initialisers take no generator, and seeding the global one would disturb every other thread.
    """

    _DRAWS: frozenset[Callable[..., Any]] = frozenset(
        [
            torch.Tensor.normal_,
            torch.Tensor.uniform_,
            torch.Tensor.random_,
            torch.Tensor.bernoulli_,
            torch.normal,
            torch.rand,
            torch.randn,
            torch.randint,
            torch.randperm,
            torch.bernoulli,
            # Initialisers that overriding stops at, so that their inner draws are not seen here.
            nn.init.uniform_,
            nn.init.normal_,
            nn.init.trunc_normal_,
            nn.init.xavier_uniform_,
            nn.init.xavier_normal_,
            nn.init.kaiming_uniform_,
            nn.init.kaiming_normal_,
            nn.init.orthogonal_,
        ]
    )

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in self._DRAWS and options.get("generator") is None:
            options["generator"] = self.generator
        return func(*args, **options)


def _with_image_size(config: ModelConfig, image_size: int | None) -> ModelConfig:
    """The config for pictures of that size, without the wish for pretrained weights. Raises ValueError."""
    vision: ModelConfig = {**config["vision_cfg"], "timm_model_pretrained": False}
    timm_name, patch = vision.get("timm_model_name"), vision.get("patch_size", 16)
    if image_size is not None and image_size != vision.get("image_size"):
        native = timm.get_pretrained_cfg(timm_name, allow_unregistered=False) if timm_name else None
        if native is not None and native.fixed_input_size and native.input_size[-1] != image_size:
            raise ValueError(
                f"image size {image_size} does not fit {timm_name}, which open_clip builds for "
                f"{native.input_size[-1]} pixels: give that, or the timm model of the size you want."
            )
        if not timm_name and isinstance(patch, int) and image_size % patch:
            raise ValueError(
                f"image size {image_size} does not fit patches of {patch} pixels: give a multiple of {patch}."
            )
        vision["image_size"] = image_size
    return {**config, "vision_cfg": vision}
