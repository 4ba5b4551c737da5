"""timm's SwinTransformer, alone or as the trunk of open_clip's TimmModel: four stages, each with a residual stream."""

from typing import Any

from open_clip.timm_model import TimmModel
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from raychain.models.architectures.timm_head import WRAPPER, add_classifier, add_head, wrapped
from raychain.models.axes import Tower, TowerBuilder, UndescribedError

KIND = "timm SwinTransformer"


def describe_timm_swin(visual: Any) -> Tower | None:
    """A Swin transformer (version 1). Relative position tables have one column a head; patch merging reads 4 × embed.

    Blocks alternate between plain and shifted windows, so layers only replace layers of the same parity. Returns None
    for another trunk.
    """
    if not isinstance(visual, TimmModel) or not isinstance(visual.trunk, SwinTransformer):
        return None
    tower = TowerBuilder("visual", KIND, "visual.", visual.state_dict())
    add_head(tower, _describe(tower, visual.trunk), "trunk.head.fc")
    return tower.finish()


def describe_plain_timm_swin(model: Any) -> Tower | None:
    """The same of a timm Swin transformer that is no part of another model, with its classifier; else None."""
    if not isinstance(model, SwinTransformer):
        return None
    tower = TowerBuilder("backbone", KIND, "", wrapped(model), WRAPPER)
    add_classifier(tower, _describe(tower, model), "trunk.head.fc")
    return tower.finish()


def _describe(tower: TowerBuilder, trunk: Any) -> str:
    """Adds all but what reads the features; returns the last stage's stream."""
    if not isinstance(trunk.norm, nn.LayerNorm):
        raise UndescribedError(KIND, f"parameter {tower.prefix}norm is not described for {KIND}: no LayerNorm")
    channels, height, across = tower.tensors["trunk.patch_embed.proj.weight"].shape[1:]
    for name, size in (("rgb", channels), ("patch_y", height), ("patch_x", across), ("qkv", 3), ("neighbours", 4)):
        tower.space(name, size, "fixed")
    # The patch embedding's own LayerNorm writes the first stage's stream.
    has_norm = isinstance(trunk.patch_embed.norm, nn.LayerNorm)
    written = "patches" if has_norm else "embed0"
    if has_norm:
        tower.space(written, trunk.layers[0].blocks[0].dim, "stream", gain="trunk.patch_embed.norm.weight")
    for stage, module in enumerate(trunk.layers):
        _add_stage(tower, stage, module)
    tower.add("trunk.patch_embed.proj.weight", f">{written} rgb patch_y patch_x", "weight")
    tower.add("trunk.patch_embed.proj.bias", f">{written}", "bias")
    tower.add("trunk.patch_embed.norm.weight", ">embed0", "gain")
    tower.add("trunk.patch_embed.norm.bias", ">embed0", "shift")
    last = f"embed{len(trunk.layers) - 1}"
    tower.add("trunk.norm.weight", last, "gain")
    tower.add("trunk.norm.bias", last, "shift")
    return last


def _add_stage(tower: TowerBuilder, stage: int, module: Any) -> None:
    """Stage `stage` of the trunk: patch merging from the stage before, then blocks on its own stream."""
    first = module.blocks[0]
    embed, heads, head_dim, mlp, stack = (f"{name}{stage}" for name in ("embed", "heads", "head_dim", "mlp", "stage"))
    tower.space(embed, first.dim, "stream")
    tower.space(heads, first.attn.num_heads, "units")
    tower.space(head_dim, first.attn.proj.in_features // first.attn.num_heads, "fixed")
    tower.space(mlp, first.mlp.fc1.out_features, "units")
    tower.space(f"offsets{stage}", first.attn.relative_position_bias_table.shape[0], "fixed")
    tower.stack(stack, len(module.blocks), period=2)
    merging = f"trunk.layers.{stage}.downsample."
    before = f"embed{stage - 1}"
    if merging + "norm.weight" in tower.tensors:
        tower.add(merging + "norm.weight", f"(neighbours {before})", "gain")
        tower.add(merging + "norm.bias", f"(neighbours {before})", "shift")
        tower.add(merging + "reduction.weight", f">{embed} (<neighbours <{before})", "weight")
    block = f"trunk.layers.{stage}.blocks.{{}}."
    for index in range(len(module.blocks)):
        layer = (stack, index)
        for norm in ("norm1", "norm2"):
            tower.add(f"{block}{norm}.weight", embed, "gain", layer=layer)
            tower.add(f"{block}{norm}.bias", embed, "shift", layer=layer)
        table = block + "attn.relative_position_bias_table"
        tower.add(table, f"offsets{stage} >{heads}", "weight", layer=layer)
        tower.add(block + "attn.qkv.weight", f"(qkv >{heads} {head_dim}) <{embed}", "weight", layer=layer)
        tower.add(block + "attn.qkv.bias", f"(qkv >{heads} {head_dim})", "bias", layer=layer)
        attended = f"(<{heads} {head_dim})"
        tower.add_branch_end(block + "attn.proj", embed, attended, layer=layer, scale=block + "ls1.gamma")
        tower.add(block + "mlp.fc1.weight", f">{mlp} <{embed}", "weight", layer=layer)
        tower.add(block + "mlp.fc1.bias", f">{mlp}", "bias", layer=layer)
        tower.add_branch_end(block + "mlp.fc2", embed, f"<{mlp}", layer=layer, scale=block + "ls2.gamma")
