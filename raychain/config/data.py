"""What a run reads, as a user writes it: shards, captions, and what the cache keeps of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from raychain.schema.captions import KeySplit, caption_key
from raychain.schema.component import Component, OneOrMore, Seed

SEPARATOR = "::"
"""Between sources in one string, and between their weights, as open_clip has it."""


def _area_range(crop: tuple[float, float]) -> tuple[float, float]:
    if not 0 < crop[0] <= crop[1] <= 1:
        raise ValueError("allowed is [low, high] with 0 < low <= high <= 1")
    return crop


AreaRange = Annotated[tuple[float, float], AfterValidator(_area_range)]


class Demo(Component):
    """Render OpenMoji shards into a folder when they are not there yet (`raychain data demo`)."""

    out: str
    """Folder of the shards."""
    names: int = Field(240, ge=2)
    """Emoji names, which are the classes of the zero-shot task."""
    pictures: int = Field(16_000, ge=1)
    """Training pictures."""
    seed: Seed = 0
    """Decides which pictures are drawn."""


class Captions(Component):
    """Where a picture's captions stand and how many are used a step (LaCLIP)."""

    keys: OneOrMore = ("txt",)
    """Members that hold captions: `txt` (one caption), `json.KEY` (a string or a list of strings). With `|sentences`,
    as in `json.description|sentences`, every sentence of a text is a caption of its own."""
    per_image: int = Field(1, ge=1, le=1000)
    """Captions of an image in the loss. Above 1 the first key's caption is always one of them, the rest are drawn anew
    every epoch."""

    @field_validator("keys")
    @classmethod
    def _known_forms(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for key in keys:
            caption_key(key)
        return keys


class Source(Component):
    """Shards that are drawn from at a rate of their own."""

    shards: OneOrMore
    """Shard addresses, as `data.train`."""
    weight: float = Field(1.0, gt=0)
    """How often each of its samples comes in an epoch: 2 is twice, 0.5 every other epoch."""


def _sources(value: Any) -> Any:
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(source for entry in values for source in _parted(entry))


def _parted(entry: Any) -> list[Any]:
    """The sources of one entry; several where it has `weights`, as open_clip's users write them."""
    if isinstance(entry, str):
        return [{"shards": (entry,)}]
    if not isinstance(entry, dict) or "weights" not in entry:
        return [entry]
    parts, weights = (_several(entry.get(name)) for name in ("shards", "weights"))
    if entry.keys() != {"shards", "weights"} or not parts or len(parts) != len(weights):
        raise ValueError('allowed is {shards: "a::b", weights: [1, 2]}, a weight for each source')
    return [{"shards": part, "weight": weight} for part, weight in zip(parts, weights, strict=True)]


def _several(value: Any) -> list[Any]:
    """The values of a list, or of a string with `::` between them."""
    if isinstance(value, str):
        return value.split(SEPARATOR)
    return list(value) if isinstance(value, list | tuple) else []


Sources = Annotated[tuple[Source, ...], BeforeValidator(_sources), Field(min_length=1)]


class Data(Component):
    """Training pictures: webdataset tar shards in img2dataset's layout."""

    train: Sources
    """Shard addresses: paths, s3://, gs://, https://, hf:// or `pipe:COMMAND`, with braces (and globs, but on the web);
    one, several with `::` between them, a list, or a list of sources `{shards: …, weight: 2}`. open_clip's way
    to write sources, `{shards: "a::b", weights: [1, 2]}`, is known too."""
    demo: Demo | None = None
    """Render demo shards first."""
    samples: int | None = Field(None, ge=1)
    """Samples an epoch; counted from the shards when absent."""
    captions: Captions = Captions()
    image_size: int | None = Field(None, ge=8, le=8192)
    """Pixels a side; the model's own when absent."""
    crop: AreaRange | None = None
    """Area range of a random resized crop a step, such as [0.9, 1.0]; centre crop when absent."""
    augment_on: Literal["host", "device"] = "host"
    """Where random crops are resized, and pictures mirrored: by the worker's processor (host), or on the GPU that
    trains (device), which is sent 2.4 times the bytes, while the processor only copies. Needs `crop`. Pictures differ
    by a level here and there, so the keys of such stages are others. Not together with what changes finished pictures:
    `task.augment`, `task.color_jitter`, `task.erase`, `task.mixup`, `task.cutmix`. On CPUs it gains nothing."""
    shuffle_window: int = Field(8, ge=1)
    """Shards whose samples are shuffled together (the shards' order is shuffled too); with more lanes than that, one of
    each lane."""
    lanes: int | None = Field(None, ge=1, le=4096)
    """Parts into which the samples are cut once; a batch takes as many of each, and a node reads those of its own
    workers alone. Absent: the largest power of two up to 64 that leaves a lane 16 shards, 1 below 32 shards."""
    store: Literal["raw", "jpeg"] | None = None
    """What the cache keeps of a picture: its pixels (raw), or JPEG of quality 95 in a seventh of the bytes, off by a
    level or two. Absent: raw where the pixels of all samples together are 64 GiB at most, else jpeg."""
    key_split: KeySplit = "first"
    """The dot of a member's file name at which its extension begins; what stands before names the sample. first is
    webdataset's rule: `photo.v1.jpg` is the `v1.jpg` of the sample `photo`, and no picture. last makes it the picture
    of `photo.v1`. Shards of `evaluate` are read in the same way."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Share of samples that may be unusable (`raychain data check` counts them); above it the run stops."""

    @field_validator("augment_on")
    @classmethod
    def _with_crop(cls, augment_on: str, info: ValidationInfo) -> str:
        if augment_on == "device" and info.data.get("crop", ()) is None:
            raise ValueError(
                "allowed is device with `data.crop`: the centre crop is made once, when a shard is decoded"
            )
        return augment_on


class StageData(Component):
    """The keys of `data` in which a stage differs from the rest of the chain."""

    train: Sources | None = None
    """Shards that this stage reads."""
    samples: int | None = Field(None, ge=1)
    """Samples an epoch of this stage; counted from its shards when absent."""
    captions: Captions | None = None
    """Captions of this stage."""
    image_size: int | None = Field(None, ge=8, le=8192)
    """Pixels a side in this stage."""
    crop: AreaRange | None = None
    """Area range of its random resized crops; null: centre crop."""
    lanes: int | None = Field(None, ge=1, le=4096)
    """Lanes of its data."""
    key_split: KeySplit | None = None
    """The dot at which extensions begin in its shards."""
