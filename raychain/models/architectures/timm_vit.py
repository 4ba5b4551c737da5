"""timm's VisionTransformer (ViT, DeiT, DeiT III, DINOv2), alone or as the trunk of open_clip's TimmModel: fused qkv as
one Linear, optional layer scale and registers.
"""

from typing import Any

from open_clip.timm_model import TimmModel
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from raychain.models.architectures.timm_head import WRAPPER, add_classifier, add_head, wrapped
from raychain.models.axes import Tower, TowerBuilder, UndescribedError

KIND = "timm VisionTransformer"


def describe_timm_vit(visual: Any) -> Tower | None:
    """A timm ViT with pre-LN blocks: class token or average pool, with or without norm_pre, layer scale, q/k norm.

    Returns None for another trunk; raises UndescribedError for other blocks or attentional pooling.
    """
    if not isinstance(visual, TimmModel) or not isinstance(visual.trunk, VisionTransformer):
        return None
    tower = TowerBuilder("visual", KIND, "visual.", visual.state_dict())
    _describe(tower, visual.trunk)
    add_head(tower, "embed", "trunk.head")
    return tower.finish()


def describe_plain_timm_vit(model: Any) -> Tower | None:
    """The same of a timm ViT that is no part of another model, with its classifiers; None for another model."""
    if not isinstance(model, VisionTransformer):
        return None
    tower = TowerBuilder("backbone", KIND, "", wrapped(model), WRAPPER)
    _describe(tower, model)
    add_classifier(tower, "embed", "trunk.head", "trunk.head_dist")
    return tower.finish()


def _describe(tower: TowerBuilder, trunk: Any) -> None:
    block: Any = trunk.blocks[0]
    if type(block) is not Block or not isinstance(block.norm1, nn.LayerNorm):
        name = type(block).__name__
        raise UndescribedError(KIND, f"parameter {tower.prefix}blocks.0 is not described for {KIND}: block {name}")
    if isinstance(trunk.norm, nn.Identity) and isinstance(trunk.fc_norm, nn.Identity):
        raise UndescribedError(KIND, f"the model is not described for {KIND}: no LayerNorm before the head")
    if not isinstance(getattr(trunk.patch_embed, "proj", None), nn.Conv2d):
        raise UndescribedError(KIND, f"parameters {tower.prefix}patch_embed.* are not described for {KIND}: no Conv2d")
    tensors = tower.tensors
    height, across = tensors["trunk.patch_embed.proj.weight"].shape[2:]
    for name, size in (("one", 1), ("rgb", trunk.in_chans), ("patch_y", height), ("patch_x", across), ("qkv", 3)):
        tower.space(name, size, "fixed")
    tower.space("embed", trunk.embed_dim, "stream")
    attention: Any = block.attn
    mlp: Any = block.mlp
    tower.space("heads", attention.num_heads, "units")
    tower.space("head_dim", attention.head_dim, "fixed")
    tower.space("mlp", mlp.fc1.out_features, "units")
    tower.stack("layers", len(trunk.blocks))
    # What the embeddings write is the stream itself, unless norm_pre normalises it first.
    written = "embed"
    if isinstance(trunk.norm_pre, nn.LayerNorm):
        written = "patches"
        tower.space(written, trunk.embed_dim, "stream", gain="trunk.norm_pre.weight")
    _add_embeddings(tower, written)
    for index in range(len(trunk.blocks)):
        _add_block(tower, index)
    for norm in ("norm", "fc_norm"):
        tower.add(f"trunk.{norm}.weight", "embed", "gain")
        tower.add(f"trunk.{norm}.bias", "embed", "shift")


def _add_embeddings(tower: TowerBuilder, written: str) -> None:
    tower.add("trunk.patch_embed.proj.weight", f">{written} rgb patch_y patch_x", "weight")
    tower.add("trunk.patch_embed.proj.bias", f">{written}", "bias")
    for token in ("cls_token", "dist_token"):
        tower.add(f"trunk.{token}", f"one one >{written}", "weight")
    for name, count in (("trunk.reg_token", "registers"), ("trunk.pos_embed", "position")):
        if name in tower.tensors:
            tower.space(count, tower.tensors[name].shape[1], "fixed")
            tower.add(name, f"one {count} >{written}", "weight")
    tower.add("trunk.norm_pre.weight", ">embed", "gain")
    tower.add("trunk.norm_pre.bias", ">embed", "shift")


def _add_block(tower: TowerBuilder, index: int) -> None:
    block, layer = "trunk.blocks.{}.", ("layers", index)
    for norm in ("norm1", "norm2"):
        tower.add(f"{block}{norm}.weight", "embed", "gain", layer=layer)
        tower.add(f"{block}{norm}.bias", "embed", "shift", layer=layer)
    tower.add(block + "attn.qkv.weight", "(qkv >heads head_dim) <embed", "weight", layer=layer)
    tower.add(block + "attn.qkv.bias", "(qkv >heads head_dim)", "bias", layer=layer)
    for norm in ("q_norm", "k_norm"):
        tower.add(f"{block}attn.{norm}.weight", "head_dim", "gain", layer=layer)
        tower.add(f"{block}attn.{norm}.bias", "head_dim", "shift", layer=layer)
    tower.add_branch_end(block + "attn.proj", "embed", "(<heads head_dim)", layer=layer, scale=block + "ls1.gamma")
    tower.add(block + "mlp.fc1.weight", ">mlp <embed", "weight", layer=layer)
    tower.add(block + "mlp.fc1.bias", ">mlp", "bias", layer=layer)
    tower.add_branch_end(block + "mlp.fc2", "embed", "<mlp", layer=layer, scale=block + "ls2.gamma")
