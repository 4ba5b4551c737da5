"""The projection open_clip's TimmModel puts behind a timm trunk."""

from raychain.families.axes import TowerBuilder


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
