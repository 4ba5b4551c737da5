"""Building a model of a family with random weights: no download, no trace in the caller's random state."""

from functools import lru_cache
from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg
from torch import nn

from raychain.families.registry import model_config


def build(
    name: str, *, seed: int, image_size: int | None = None, device: str | torch.device = "cpu"
) -> CLIP | CustomTextCLIP:
    """A freshly initialised fp32 open_clip model.

    The same name, image size and seed give the same weights on every device (they are drawn on the CPU and moved),
    and the global random state is left as it was. `image_size` (pixels) replaces the config's. On `device="meta"`
    nothing is allocated and `seed` means nothing: shapes only, in well under a second.

    Raises UnknownModelError (see `model_config`), and ValueError where the image size does not fit the image tower.
    """
    return build_config(model_config(name), seed=seed, image_size=image_size, device=device)


def build_config(
    config: dict[str, Any], *, seed: int, image_size: int | None = None, device: str | torch.device = "cpu"
) -> CLIP | CustomTextCLIP:
    """`build` for a `model_cfg` without a registered name, such as the one in a checkpoint's open_clip_config.json."""
    device = torch.device(device)
    config = _with_image_size(config, image_size)
    custom_text = config.pop("custom_text", False)
    model_class = CustomTextCLIP if custom_text else CLIP
    on_meta = device.type == "meta"
    with torch.random.fork_rng(devices=[]), torch.device("meta" if on_meta else "cpu"):
        torch.default_generator.manual_seed(seed)
        model = model_class(**config)
    if image_size is not None and "timm_model_name" in config["vision_cfg"]:
        model.visual.set_input_size(image_size)
    set_model_preprocess_cfg(model, {**vars(PreprocessCfg()), "size": model.visual.image_size})
    return model if on_meta else model.to(device)


@lru_cache(maxsize=64)
def parameter_count(name: str) -> int:
    """The number of parameters of both towers and the logit scale, counted without allocating them."""
    model: nn.Module = build(name, seed=0, device="meta")
    return sum(parameter.numel() for parameter in model.parameters())


def _with_image_size(config: dict[str, Any], image_size: int | None) -> dict[str, Any]:
    vision: dict[str, Any] = dict(config["vision_cfg"])
    if image_size is not None:
        patch = vision.get("patch_size", 16)
        if "timm_model_name" not in vision and (image_size <= 0 or image_size % patch):
            raise ValueError(
                f"image size {image_size} does not fit patches of {patch} pixels: give a multiple of {patch}."
            )
        vision["image_size"] = image_size
    return {**config, "vision_cfg": vision}
