"""Checkpoints on object storage: the files that reading one needs, copied to this machine."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from pyarrow import fs

from raychain.core.storage import TRANSFER_S, is_local, local_path, resolve
from raychain.data.fetch import patiently
from raychain.models.checkpoints import CONFIG, SUFFIXES, WEIGHTS, CheckpointError
from raychain.models.registry import model_names

FORMS = "an open_clip folder, a stage folder, a .safetensors or .pt file that exists; s3:// and gs:// too"
"""What a checkpoint may be."""


def local_checkpoint(address: str, scratch: Path, also: Collection[str] = (), *, weights: bool = True) -> Path:
    """A path that `read_checkpoint` takes: `address` itself if local, else a copy in the empty folder `scratch`.

    Of a folder, config and weights are copied, and what `also` names; beside a weights file, the config if there is
    one. Without `weights` what is copied is the folder of that. Raises CheckpointError for an address that does not
    exist or cannot be read.
    """
    address = address.removeprefix("local-dir:")
    if is_local(address):
        return Path(resolve(address)[1])
    try:
        filesystem, path = resolve(address)
        kind = patiently(address, lambda: filesystem.get_file_info(path)).type
        if kind == fs.FileType.NotFound:
            raise CheckpointError(f"{address} does not exist")
        is_file = kind == fs.FileType.File
        folder = path.rpartition("/")[0] if is_file else path
        found = patiently(address, lambda: filesystem.get_file_info(fs.FileSelector(folder)), TRANSFER_S)
        names = [info.base_name for info in found]
        known = next(([name] for name in WEIGHTS if name in names), [n for n in names if n.endswith(SUFFIXES)])
        wanted = [path.rpartition("/")[2]] if is_file else known
        others = [name for name in names if name == CONFIG or (name in also and not is_file)]
        for name in dict.fromkeys([*(wanted if weights else ()), *others]):
            fs.copy_files(f"{folder}/{name}", str(scratch / name), filesystem, fs.LocalFileSystem())
    except OSError as error:
        raise CheckpointError(f"{address} cannot be read: {error}") from None
    return scratch / wanted[0] if is_file and weights else scratch


def is_name(address: str) -> bool:
    """Whether it is no address but a name, of which weights would have to be downloaded."""
    plain = address.removeprefix("local-dir:")
    return plain.startswith(("hf-hub:", "hf_hub:")) or (plain in model_names() and not Path(plain).exists())


def stages_in(address: str) -> str:
    """Names the stages of a run folder that was given in place of one; empty if it is none."""
    stages = local_path(address, "CHECKPOINT") / "stages"
    names = sorted(path.name for path in stages.iterdir()) if stages.is_dir() else []
    return f"this is a run folder: give one of its stages, such as {stages / names[-1]}" if names else ""
