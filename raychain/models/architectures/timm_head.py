"""What reads a timm trunk's features: the projection open_clip's TimmModel puts behind it, or its own classifier."""

from collections.abc import Mapping

import torch
from torch import nn

from raychain.models.axes import TowerBuilder

WRAPPER = "trunk."


def wrapped(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """The tensors of a timm model by the names they would have in open_clip's TimmModel."""
    return {WRAPPER + name: tensor for name, tensor in model.state_dict().items()}


def add_classifier(tower: TowerBuilder, stream: str, *classifiers: str) -> None:
    """Describes a timm model's own classifiers; the number of classes is the same in every model of a chain."""
    for linear in classifiers:
        if f"{linear}.weight" in tower.tensors:
            tower.space("classes", tower.tensors[f"{linear}.weight"].shape[0], "fixed")
            tower.add(f"{linear}.weight", f">classes <{stream}", "weight")
            tower.add(f"{linear}.bias", ">classes", "bias")


def add_head(tower: TowerBuilder, stream: str, classifier: str) -> None:
    """Describes the head that reads the normalised stream: a Linear, an MLP, or the trunk's own classifier."""
    tensors = tower.tensors
    for linear in ("head.proj", classifier):
        if f"{linear}.weight" in tensors:
            tower.space("out", tensors[f"{linear}.weight"].shape[0], "shared")
            tower.add(f"{linear}.weight", f">out <{stream}", "weight")
            tower.add(f"{linear}.bias", ">out", "bias")
    if "head.mlp.fc1.weight" in tensors:
        tower.space("out", tensors["head.mlp.fc2.weight"].shape[0], "shared")
        tower.space("head_mlp", tensors["head.mlp.fc1.weight"].shape[0], "units")
        tower.add("head.mlp.fc1.weight", f">head_mlp <{stream}", "weight")
        tower.add("head.mlp.fc1.bias", ">head_mlp", "bias")
        tower.add("head.mlp.fc2.weight", ">out <head_mlp", "weight")
        tower.add("head.mlp.fc2.bias", ">out", "bias")
