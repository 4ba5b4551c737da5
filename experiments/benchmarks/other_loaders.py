"""Other libraries' loaders on the pictures of `loader.py`, where they are installed: mosaicml-streaming, NVIDIA DALI.

Both come from PyPI, into an environment of their own beside raychain's: mosaicml-streaming asks for an older numpy, and
installs here without its dependencies on clouds (`pip install --no-deps`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as T
import webdataset
from PIL import Image

Tokenize = Callable[[Sequence[str]], np.ndarray]


def recipe(size: int, crop: tuple[float, float] | None, mode: T.InterpolationMode) -> T.Compose:
    """A picture as torchvision makes it: cropped, resized and converted to float."""
    if crop:
        return T.Compose([T.RandomResizedCrop(size, crop, interpolation=mode), T.ToTensor()])
    return T.Compose([T.Resize(size, mode), T.CenterCrop(size), T.ToTensor()])


def has_streaming() -> bool:
    """Whether mosaicml-streaming is installed."""
    return find_spec("streaming") is not None


def write_mds(shards: Sequence[str], folder: Path) -> None:
    """The samples of tar shards, byte by byte, in mosaicml-streaming's format."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"jpg": "bytes", "txt": "str"}) as out:
        for sample in webdataset.WebDataset(list(shards), shardshuffle=False, empty_check=False):
            out.write({"jpg": sample["jpg"], "txt": sample["txt"].decode()})


def streamed(
    folder: Path, batch: int, size: int, crop: tuple[float, float] | None, tokenize: Tokenize
) -> Iterator[torch.Tensor]:
    """Batches of StreamingDataset: PIL decodes, torchvision crops, bicubic."""
    from streaming import StreamingDataset

    transform = recipe(size, crop, T.InterpolationMode.BICUBIC)

    class Pictures(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> tuple[torch.Tensor, np.ndarray]:
            sample = super().__getitem__(index)
            return transform(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")), tokenize([sample["txt"]])[0]

    pictures = Pictures(local=str(folder), shuffle=True, batch_size=batch)
    for images, _ in torch.utils.data.DataLoader(pictures, batch, drop_last=True):
        yield images


def has_dali() -> bool:
    """Whether NVIDIA DALI is installed."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def dali(
    shards: Sequence[str], samples: int, batch: int, size: int, crop: tuple[float, float] | None, tokenize: Tokenize
) -> Iterator[torch.Tensor]:
    """Batches of DALI's CPU path in one thread: the crop alone is decoded, cubic with antialiasing, uint8."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None)
    def pipeline() -> tuple[object, object]:
        jpg, txt = fn.readers.webdataset(paths=list(shards), ext=["jpg", "txt"], missing_component_behavior="error")
        if crop:
            pixels = fn.decoders.image_random_crop(jpg, device="cpu", random_area=list(crop))
            pixels = fn.resize(pixels, size=[size, size], interp_type=types.INTERP_CUBIC, antialias=True)
        else:
            pixels = fn.decoders.image(jpg, device="cpu")
            pixels = fn.resize(pixels, size=size, mode="not_smaller", interp_type=types.INTERP_CUBIC, antialias=True)
            pixels = fn.crop(pixels, crop=[size, size])
        return pixels, fn.pad(txt)

    made = pipeline()
    made.build()  # which is not a loader's work

    def batches() -> Iterator[torch.Tensor]:
        for _ in range(samples // batch):
            images, texts = made.run()
            tokenize([bytes(text[text > 0]).decode() for text in texts.as_array()])
            yield torch.from_numpy(images.as_array())

    return batches()
