"""Checkpoints on object storage: the files that reading one needs, copied to this machine."""

from __future__ import annotations

from pathlib import Path

from pyarrow import fs

from raychain.core.storage import TRANSFER_S, is_local, resolve
from raychain.data.fetch import patiently
from raychain.models.checkpoints import CONFIG, SUFFIXES, WEIGHTS, CheckpointError


def local_checkpoint(address: str, scratch: Path) -> Path:
    """A path that `read_checkpoint` takes: `address` itself if local, else a copy in the empty folder `scratch`.

    Of a folder, config and weights are copied, not what else it holds (a stage's optimiser state); beside a weights
    file, the config if there is one. Raises CheckpointError for an address that does not exist or cannot be read.
    """
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
        weights = next(([name] for name in WEIGHTS if name in names), [n for n in names if n.endswith(SUFFIXES)])
        wanted = [path.rpartition("/")[2]] if is_file else weights
        for name in wanted + [name for name in names if name == CONFIG]:
            fs.copy_files(f"{folder}/{name}", str(scratch / name), filesystem, fs.LocalFileSystem())
    except OSError as error:
        raise CheckpointError(f"{address} cannot be read: {error}") from None
    return scratch / wanted[0] if is_file else scratch
