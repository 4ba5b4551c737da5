"""Building a model of a family with random weights: no download, no trace in the caller's random state."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, cast

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

from raychain.families.registry import model_config

Module = TypeVar("Module", bound=nn.Module)


def build(
    name: str, *, seed: int, image_size: int | None = None, device: str | torch.device = "cpu"
) -> CLIP | CustomTextCLIP:
    """A freshly initialised fp32 open_clip model.

    The same name, image size and seed give the same weights on every device (they are drawn on the CPU and moved).
    The global random state is neither used nor changed, so another thread may train meanwhile. `image_size` (pixels)
    replaces the config's. On `device="meta"` nothing is allocated and `seed` means nothing: shapes only, in well
    under a second.

    Raises UnknownModelError (see `model_config`), and ValueError where the image size does not fit the image tower.
    """
    return build_config(model_config(name), seed=seed, image_size=image_size, device=device)


def build_config(
    config: dict[str, Any], *, seed: int, image_size: int | None = None, device: str | torch.device = "cpu"
) -> CLIP | CustomTextCLIP:
    """`build` for a `model_cfg` without a registered name, such as the one in a checkpoint's open_clip_config.json."""
    config = _with_image_size(config, image_size)
    custom_text = config.pop("custom_text", False)
    model_class = CustomTextCLIP if custom_text else CLIP
    model: CLIP | CustomTextCLIP = initialised(lambda: model_class(**config), seed=seed, device=device)
    set_model_preprocess_cfg(model, {**vars(PreprocessCfg()), "size": model.visual.image_size})
    return model


def at_image_size(model: nn.Module, config: dict[str, Any], image_size: int) -> nn.Module:
    """The model of `config` for pictures of `image_size` pixels: itself, or a copy on its device whose position
    embeddings are interpolated (bicubic, as open_clip loads checkpoints of another resolution).

    Raises ValueError where the image size does not fit the image tower.
    """
    clip: Any = model
    if _pixels(clip) == image_size:
        return model
    state = dict(model.state_dict())
    device = clip.logit_scale.device
    resized: Any = build_config(config, seed=0, image_size=image_size).to(device)
    resize_pos_embed(state, resized)
    resized.load_state_dict(state)
    preprocessing = get_model_preprocess_cfg(clip)
    set_model_preprocess_cfg(resized, {**preprocessing, "size": resized.visual.image_size})
    return resized


def preprocessing_of(model: nn.Module) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` of a model: size, mean and std of its pictures, interpolation."""
    return dict(cast(Any, model.visual).preprocess_cfg)


def _pixels(clip: Any) -> int:
    size = clip.visual.image_size
    return int(size if isinstance(size, int) else size[0])


@lru_cache(maxsize=64)
def parameter_count(name: str) -> int:
    """The number of parameters of both towers and the logit scale, counted without allocating them."""
    model: nn.Module = build(name, seed=0, device="meta")
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


def _with_image_size(config: dict[str, Any], image_size: int | None) -> dict[str, Any]:
    vision: dict[str, Any] = dict(config["vision_cfg"])
    if image_size is not None and "timm_model_name" in vision:
        native = timm.get_pretrained_cfg(vision["timm_model_name"], allow_unregistered=False)
        if native is not None and native.fixed_input_size and native.input_size[-1] != image_size:
            raise ValueError(
                f"image size {image_size} does not fit {vision['timm_model_name']}, which open_clip builds for "
                f"{native.input_size[-1]} pixels: give that, or the timm model of the size you want."
            )
    elif image_size is not None:
        patch = vision.get("patch_size", 16)
        if image_size <= 0 or image_size % patch:
            raise ValueError(
                f"image size {image_size} does not fit patches of {patch} pixels: give a multiple of {patch}."
            )
    return {**config, "vision_cfg": {**vision, **({"image_size": image_size} if image_size is not None else {})}}
