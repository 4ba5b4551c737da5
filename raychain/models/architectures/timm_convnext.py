"""timm's ConvNeXt: four stages, each with a residual stream, blocks of a depthwise convolution and an MLP."""

from typing import Any

from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import nn

from raychain.models.architectures.timm_head import WRAPPER, add_classifier, wrapped
from raychain.models.axes import Tower, TowerBuilder, UndescribedError

KIND = "timm ConvNeXt"


def describe_plain_timm_convnext(model: Any) -> Tower | None:
    """A ConvNeXt (version 1) with its classifier; None for another model.

    Depth grows exactly. A wider stream is exact where widths are whole multiples and coordinates are copied
    (`duplicate`): each block normalises what its depthwise convolution makes of the stream, of which the stream's mean,
    which `centred` keeps, does not tell the mean. Raises UndescribedError for ConvNeXt V2.
    """
    if not isinstance(model, ConvNeXt):
        return None
    tower = TowerBuilder("backbone", KIND, "", wrapped(model), WRAPPER)
    stages: Any = model.stages
    block: Any = stages[0].blocks[0]
    if type(block) is not ConvNeXtBlock or not isinstance(block.norm, nn.LayerNorm) or block.gamma is None:
        raise UndescribedError(KIND, f"the model is not described for {KIND}: no block with LayerNorm and layer scale")
    if "trunk.stem.1.weight" not in tower.tensors or "trunk.stages.0.downsample.1.weight" in tower.tensors:
        raise UndescribedError(KIND, f"parameters stem.* are not described for {KIND}: no patches of 4 with LayerNorm")
    channels, height, across = tower.tensors["trunk.stem.0.weight"].shape[1:]
    kernel = tower.tensors["trunk.stages.0.blocks.0.conv_dw.weight"].shape[2]
    sizes = {"one": 1, "rgb": channels, "patch_y": height, "patch_x": across, "kernel_y": kernel, "kernel_x": kernel}
    for name, size in sizes.items():
        tower.space(name, size, "fixed")
    tower.space("patches", block.conv_dw.in_channels, "stream", gain="trunk.stem.1.weight")
    tower.add("trunk.stem.0.weight", ">patches rgb patch_y patch_x", "weight")
    tower.add("trunk.stem.0.bias", ">patches", "bias")
    for stage, module in enumerate(stages):
        _add_stage(tower, stage, module)
    tower.add("trunk.stem.1.weight", ">embed0", "gain")
    tower.add("trunk.stem.1.bias", ">embed0", "shift")
    last = f"embed{len(stages) - 1}"
    for norm in ("norm_pre", "head.norm"):
        tower.add(f"trunk.{norm}.weight", last, "gain")
        tower.add(f"trunk.{norm}.bias", last, "shift")
    add_classifier(tower, last, "trunk.head.fc")
    return tower.finish()


def _add_stage(tower: TowerBuilder, stage: int, module: Any) -> None:
    """Stage `stage`: a convolution that halves the picture, then blocks on the stage's stream."""
    embed, mlp, stack, before = f"embed{stage}", f"mlp{stage}", f"stack{stage}", f"embed{stage - 1}"
    first = module.blocks[0]
    tower.space(embed, first.conv_dw.in_channels, "stream")
    tower.space(mlp, tower.tensors[f"trunk.stages.{stage}.blocks.0.mlp.fc1.weight"].shape[0], "units")
    tower.stack(stack, len(module.blocks))
    halving = f"trunk.stages.{stage}.downsample."
    if halving + "1.weight" in tower.tensors:
        for name, size in zip(("half_y", "half_x"), tower.tensors[halving + "1.weight"].shape[2:], strict=True):
            tower.space(name, size, "fixed")
        tower.add(halving + "0.weight", before, "gain")
        tower.add(halving + "0.bias", before, "shift")
        tower.add(halving + "1.weight", f">{embed} <{before} half_y half_x", "weight")
        tower.add(halving + "1.bias", f">{embed}", "bias")
    block = f"trunk.stages.{stage}.blocks.{{}}."
    pixel = " one one" if tower.tensors[f"trunk.stages.{stage}.blocks.0.mlp.fc1.weight"].ndim == 4 else ""
    closing: dict[str, Any] = {"closes": True, "scaled_by": block + "gamma"}
    for index in range(len(module.blocks)):
        layer = (stack, index)
        tower.add(block + "conv_dw.weight", f"{embed} one kernel_y kernel_x", "weight", layer=layer)
        tower.add(block + "conv_dw.bias", embed, "bias", layer=layer)
        tower.add(block + "norm.weight", embed, "gain", layer=layer)
        tower.add(block + "norm.bias", embed, "shift", layer=layer)
        tower.add(block + "mlp.fc1.weight", f">{mlp} <{embed}{pixel}", "weight", layer=layer)
        tower.add(block + "mlp.fc1.bias", f">{mlp}", "bias", layer=layer)
        tower.add(block + "mlp.fc2.weight", f">{embed} <{mlp}{pixel}", "weight", layer=layer, **closing)
        tower.add(block + "mlp.fc2.bias", f">{embed}", "bias", layer=layer, **closing)
        tower.add(block + "gamma", f">{embed}", "scale", layer=layer)
