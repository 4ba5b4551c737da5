"""Shards of labelled pictures for the tests of classification: a bright square, whose place is the class."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 5
PLACES = ((4, 4), (4, 24), (24, 4), (24, 24), (14, 14))


def picture(label: int, rng: np.random.Generator) -> bytes:
    """A PNG of 40 pixels a side, noise but for the square."""
    pixels = rng.normal(90, 25, (40, 40, 3))
    top, left = PLACES[label]
    pixels[top : top + 12, left : left + 12] += 120
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "png")
    return file.getvalue()


def write(folder: Path, name: str, count: int, shards: int, seed: int = 0) -> None:
    """`count` pictures in `folder/name/*.tar`."""
    rng = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / name / f"{shard:05d}.tar", "w") as tar:
            for i in range(count // shards):
                label = int(rng.integers(CLASSES))
                for extension, content in (("png", picture(label, rng)), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{shard}{i:04d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def class_shards(folder: Path, train: int = 320, test: int = 100) -> Path:
    """A data set as `raychain data build` lays it out."""
    write(folder, "train", train, 2)
    write(folder, "test", test, 1, seed=1)
    (folder / "classnames.txt").write_text("".join(f"place {i}\n" for i in range(CLASSES)))
    return folder
