"""A reader of samples that are no pictures: fields in `.npy` members, float32 [channels, side, side].

The paradigm that reads them fills in hidden patches (SimMIM, Xie et al. 2022). b samples, N patches, P values a patch.
"""

from __future__ import annotations

import io
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from raychain.config.data import Data
from raychain.data.health import Bad
from raychain.data.members import Report, Sample
from raychain.data.order import Rows, mix
from raychain.data.reader import Share
from raychain.data.shards import Shard, read, survey
from raychain.data.table import CachedShard
from raychain.data.tar import split_name, walk
from raychain.errors import InputError
from raychain.models import UnknownModelError
from raychain.paradigms.base import Config, Paradigm, initialised
from raychain.paradigms.objective import Columns, Encoded, Objective, Projector
from raychain.paradigms.task import Task

ROWS = 64
"""Fields of a record batch."""


class Fields:
    """Which members are samples: a `Format`."""

    digest, remedy = "npy-1", "write each array to a member NAME.npy"

    def __str__(self) -> str:
        return "an array (npy)"

    def samples(self, file: BinaryIO, report: Report, *, names_only: bool = False) -> Iterator[Sample]:
        for name, _, content in walk(file, lambda *found: report(Bad(*found))):
            key, extension = split_name(name)
            if extension == "npy" and content:
                yield {"key": key, "npy": None if names_only else content()}


class FieldTable(CachedShard):
    """The fields of a cached shard."""

    def field(self, row: int) -> np.ndarray:
        values = self.data.column("field").chunk(row // ROWS).slice(row % ROWS, 1).flatten()
        found: np.ndarray = values.to_numpy()
        return found


@dataclass(frozen=True)
class FieldReader:
    """Batches of `fields`, float32 [n, channels, side, side], and `seed`, int64 [n]: a `Reader`."""

    shape: tuple[int, int, int]
    kept = "float32"

    @property
    def digest(self) -> str:
        return f"fields-1-{'x'.join(map(str, self.shape))}"

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"fields": list(self.shape)}

    @property
    def least_bytes(self) -> int:
        return 4 * int(np.prod(self.shape))

    def decode(self, shard: Shard, bad: list[Bad]) -> Iterator[pa.RecordBatch]:
        found: list[np.ndarray] = []
        usable = 0
        for sample in read(shard, Fields()):
            try:
                field = np.load(io.BytesIO(sample["npy"]), allow_pickle=False).astype(np.float32)
                if field.shape != self.shape or not np.isfinite(field).all():
                    raise ValueError(f"shape {field.shape}, where finite values of {self.shape} are wanted")
            except (ValueError, EOFError, OSError) as error:
                bad.append(Bad("unusable array", sample["key"], str(error)))
                continue
            found, usable = [*found, field.ravel()], usable + 1
            if len(found) == ROWS:
                yield self._batch(found)
                found = []
        if not usable:
            raise OSError(f"{shard.address}: none of its {shard.samples} arrays can be used")
        if found:
            yield self._batch(found)

    def _batch(self, fields: list[np.ndarray]) -> pa.RecordBatch:
        values = pa.array(np.concatenate(fields))
        return pa.RecordBatch.from_pydict({"field": pa.FixedSizeListArray.from_arrays(values, len(fields[0]))})

    def open(self, content: mmap.mmap | pa.Buffer, name: str) -> FieldTable:
        return FieldTable(content, name)

    def read(self, rows: Rows, tables: Mapping[int, FieldTable], seed: int, share: Share) -> dict[str, np.ndarray]:
        place = [(tables[s], r) for s, r in zip(rows.shard.tolist(), rows.row.tolist(), strict=True)]
        fields = np.stack([table.field(row % table.size) for table, row in place]).reshape(-1, *self.shape)
        return {"fields": fields, "seed": mix(seed, rows.passes, rows.shard, rows.row).view(np.int64)}


class FillIn(Objective):
    """Mean squared error of the patches that are hidden; which these are follows from the sample's seed."""

    separable, feature_names = True, ("pooled",)

    def __init__(self, model: nn.Module, patch: int, hidden: float, projector: Projector | None) -> None:
        super().__init__(model, projector)
        self.patch, self.hidden = patch, hidden

    def encode(self, part: Columns) -> Encoded:
        patches_bNP = F.unfold(part["fields"], self.patch, stride=self.patch).transpose(1, 2)
        odd_N = 2 * torch.arange(patches_bNP.shape[1], device=patches_bNP.device) + 1
        hidden_bN = (((part["seed"][:, None] * odd_N) >> 40) % 100 < 100 * self.hidden).float()
        shown = (patches_bNP * (1 - hidden_bN)[..., None]).transpose(1, 2)
        tokens = self.model.forward_features(F.fold(shown, part["fields"].shape[-2:], self.patch, stride=self.patch))
        error_bN = (self.model.head(tokens[:, 1:]).float() - patches_bNP).square().mean(-1)
        losses = (error_bN * hidden_bN).sum(1) / hidden_bN.sum(1).clamp_min(1)
        return Encoded((losses,), (F.normalize(tokens[:, 0].float(), dim=-1),))


class FieldTask(Task):
    """`task: {paradigm: masked_fields}`."""

    channels: int = 2
    patch: int = 4
    """Values a side of a patch."""
    hidden: float = 0.5
    """Share of the patches that are hidden."""


class MaskedFields(Paradigm):
    """Chains of small ViTs `fields-WIDTHxDEPTH`, such as `fields-32x1`, on arrays; `data.image_size` is their side."""

    name, options, samples, takes = "masked_fields", FieldTask, "fields", frozenset()
    task: FieldTask

    def config(self, model: str) -> Config:
        width, _, depth = model.removeprefix("fields-").partition("x")
        if not (width.isdigit() and depth.isdigit() and int(width) % 32 == 0):
            raise UnknownModelError(f"{model!r} is no fields-WIDTHxDEPTH with a WIDTH that 32 divides")
        options = {"embed_dim": int(width), "depth": int(depth), "num_heads": int(width) // 32}
        return {**options, "patch_size": self.task.patch, "in_chans": self.task.channels}

    def native_size(self, config: Config) -> int:
        return 4 * config["patch_size"]

    def build(self, config: Config, *, size: int, seed: int, device: str | torch.device = "cpu") -> nn.Module:
        values = config["in_chans"] * config["patch_size"] ** 2
        return initialised(lambda: VisionTransformer(size, num_classes=values, **config), seed=seed, device=device)

    def objective(self, model: nn.Module, config: Config, teacher: Config | None = None) -> Objective:
        projector = Projector({"pooled": (config["embed_dim"], teacher["embed_dim"])}) if teacher else None
        return FillIn(model, self.task.patch, self.task.hidden, projector)

    def survey(self, addresses: Sequence[str], data: Data, cache: Path, where: str) -> list[Shard]:
        if data.crop or data.store:
            option = "crop" if data.crop else "store"
            raise InputError(f"data.{option}", getattr(data, option), "nothing: arrays are no pictures", "leave it out")
        return survey(addresses, Fields(), cache, where)

    def reader(self, data: Data, config: Config, size: int, samples: int) -> FieldReader:
        return FieldReader((self.task.channels, size, size))

    def example(self, config: Config, size: int, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
        fields = torch.zeros(count, self.task.channels, size, size)
        return {"fields": fields, "seed": torch.arange(seed, seed + count)}
