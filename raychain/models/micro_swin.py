"""A Swin transformer small enough for a CPU, in the registry of timm, whose own smallest one is for 224 pixels."""

from typing import Any

from timm.models import SwinTransformer, build_model_with_cfg, generate_default_cfgs, register_model

default_cfgs = generate_default_cfgs(
    {
        "com_micro_swin": {
            "num_classes": 1000,
            "input_size": (3, 40, 40),
            "fixed_input_size": True,
            "pool_size": (5, 5),
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
        }
    }
)


@register_model
def com_micro_swin(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """Swin (version 1) for 40 pixels: patches of 4, windows of 5, two stages; 1.5 times the MACs of CoM-micro-L's ViT.

    No stochastic depth, unlike timm's default, as in the ViTs of its family. There are no pretrained weights.
    """
    size: dict[str, Any] = {"img_size": 40, "patch_size": 4, "window_size": 5, "drop_path_rate": 0.0}
    widths = {"embed_dim": 96, "depths": (2, 4), "num_heads": (3, 6)}
    model: SwinTransformer = build_model_with_cfg(
        SwinTransformer, "com_micro_swin", pretrained, **{**size, **widths, **kwargs}
    )
    return model
