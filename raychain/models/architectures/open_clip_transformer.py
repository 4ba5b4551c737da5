"""open_clip's own towers: VisionTransformer and the text transformer, both stacks of pre-LN residual attention
blocks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import nn

from raychain.models.axes import Tower, TowerBuilder, UndescribedError


def describe_vit(visual: Any) -> Tower | None:
    """open_clip's VisionTransformer, with or without ln_pre, layer scale or quick-GELU, class token or average pool.

    Returns None for another class; raises UndescribedError for an attentional pool and for custom attention blocks.
    """
    if not isinstance(visual, VisionTransformer):
        return None
    kind = "open_clip VisionTransformer"
    if visual.attn_pool is not None:
        raise UndescribedError(
            kind, f"parameter visual.attn_pool.query is not described for {kind}: attentional pooling"
        )
    width = visual.conv1.out_channels
    tower = TowerBuilder("visual", kind, "visual.", visual.state_dict())
    _declare_transformer(tower, visual.transformer, width)
    height, across = visual.patch_size
    tower.space("rgb", 3, "fixed")
    tower.space("patch_y", height, "fixed")
    tower.space("patch_x", across, "fixed")
    tower.space("position", visual.positional_embedding.shape[0], "fixed")
    # What the embeddings write is the stream itself, unless ln_pre normalises it first.
    has_ln_pre = isinstance(visual.ln_pre, nn.LayerNorm)
    written = "patches" if has_ln_pre else "embed"
    if has_ln_pre:
        tower.space(written, width, "stream", gain="ln_pre.weight")
    tower.add("conv1.weight", f">{written} rgb patch_y patch_x", "weight")
    tower.add("class_embedding", f">{written}", "bias")
    tower.add("positional_embedding", f"position >{written}", "weight")
    tower.add("ln_pre.weight", ">embed", "gain")
    tower.add("ln_pre.bias", ">embed", "shift")
    _add_blocks(tower, visual.transformer)
    tower.add("ln_post.weight", "embed", "gain")
    tower.add("ln_post.bias", "embed", "shift")
    tower.space("out", visual.output_dim, "shared")
    tower.add("proj", "<embed >out", "weight")
    return tower.finish()


def describe_text(module: Any, prefix: str) -> Tower | None:
    """open_clip's text transformer, as `model.text` (prefix `text.`) or with its parts on the CLIP model itself
    (prefix empty).

    Returns None where the module is no such tower; raises UndescribedError for custom attention blocks.
    """
    transformer = getattr(module, "transformer", None)
    if not isinstance(transformer, Transformer):
        return None
    tensors: Mapping[str, torch.Tensor] = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if prefix or not name.startswith(("visual.", "logit_"))
    }
    vocab, width = module.token_embedding.weight.shape
    tower = TowerBuilder("text", "open_clip text transformer", prefix, tensors)
    _declare_transformer(tower, transformer, width)
    tower.space("vocab", vocab, "fixed")
    tower.space("position", module.positional_embedding.shape[0], "fixed")
    tower.add("token_embedding.weight", "vocab >embed", "weight")
    tower.add("positional_embedding", "position >embed", "weight")
    tower.add("cls_emb", ">embed", "bias")
    _add_blocks(tower, transformer)
    tower.add("ln_final.weight", "embed", "gain")
    tower.add("ln_final.bias", "embed", "shift")
    projection = module.text_projection
    if isinstance(projection, nn.Linear):
        tower.space("out", projection.out_features, "shared")
    elif projection is not None:
        tower.space("out", projection.shape[1], "shared")
    tower.add("text_projection", "<embed >out", "weight")
    tower.add("text_projection.weight", ">out <embed", "weight")
    tower.add("text_projection.bias", ">out", "bias")
    return tower.finish()


def _declare_transformer(tower: TowerBuilder, transformer: Transformer, width: int) -> None:
    block = transformer.resblocks[0]
    if not isinstance(block, ResidualAttentionBlock):
        name = f"{tower.prefix}transformer.resblocks.0.attn.in_proj_weight"
        raise UndescribedError(
            tower.kind, f"parameter {name} is not described for {tower.kind}: block {type(block).__name__}"
        )
    heads = block.attn.num_heads
    tower.space("embed", width, "stream")
    tower.space("qkv", 3, "fixed")
    tower.space("heads", heads, "units")
    tower.space("head_dim", width // heads, "fixed")
    tower.space("mlp", block.mlp.c_fc.out_features, "units")
    tower.stack("layers", len(transformer.resblocks))


def _add_blocks(tower: TowerBuilder, transformer: Transformer) -> None:
    block = "transformer.resblocks.{}."
    for index in range(len(transformer.resblocks)):
        layer = ("layers", index)
        for norm in ("ln_1", "ln_2"):
            tower.add(f"{block}{norm}.weight", "embed", "gain", layer=layer)
            tower.add(f"{block}{norm}.bias", "embed", "shift", layer=layer)
        tower.add(block + "attn.in_proj_weight", "(qkv >heads head_dim) <embed", "weight", layer=layer)
        tower.add(block + "attn.in_proj_bias", "(qkv >heads head_dim)", "bias", layer=layer)
        attention, mlp = block + "ls_1.gamma", block + "ls_2.gamma"
        tower.add_branch_end(block + "attn.out_proj", "embed", "(<heads head_dim)", layer=layer, scale=attention)
        tower.add(block + "mlp.c_fc.weight", ">mlp <embed", "weight", layer=layer)
        tower.add(block + "mlp.c_fc.bias", ">mlp", "bias", layer=layer)
        tower.add_branch_end(block + "mlp.c_proj", "embed", "<mlp", layer=layer, scale=mlp)
