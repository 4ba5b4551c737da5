"""What a pre-training paradigm is to raychain: a name, options, and everything that depends on what is learned.

A chain's driver, scheduler, store, growth and reports know a paradigm through `Paradigm` alone. A paradigm of one's own
is a subclass in any package, found by the entry point group `raychain.paradigms` (docs/extending.md).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from raychain.data.spec import Resizing
from raychain.models.building import initialised
from raychain.models.generation import GenerationError
from raychain.paradigms.objective import Columns, Objective
from raychain.paradigms.task import Task

if TYPE_CHECKING:
    from raychain.config.data import Data
    from raychain.data.reader import Reader
    from raychain.data.shards import Shard
    from raychain.data.spec import Tokenizer
    from raychain.data.tokens import Tokenizer as Words
    from raychain.models.architectures import ModelDescription
    from raychain.planning.macs import ModelSize

Config = Mapping[str, Any]
"""A model's configuration, as JSON holds it. It is part of a stage's key."""


class Read(NamedTuple):
    """A model that was trained before: in fp32 on the CPU, with its configuration."""

    model: nn.Module
    config: Config


class Paradigm(ABC):
    """One way of pre-training. An instance holds the options of one experiment; it is cheap and made wherever needed.

    `size` is the size of a sample's input throughout: pixels a side of a picture, tokens of a text.
    """

    name: ClassVar[str]
    """What `task.paradigm` names it by."""
    options: ClassVar[type[Task]] = Task
    """The model of `task:` with its own options."""
    samples: ClassVar[str] = "samples"
    """What its samples are called in messages, in the plural."""
    takes: ClassVar[frozenset[str]] = frozenset({"pictures"})
    """What its models turn into features, of which evaluators may be made: `pictures`, `texts`; and `classes`, of which
    they give scores."""
    principled: ClassVar[bool] = False
    """Whether the three principles of planning were shown to hold for it. Elsewhere nothing is claimed by them."""
    files: ClassVar[tuple[str, ...]] = ("config.json", "model.safetensors")
    """Files that a complete stage folder has; `save` writes them."""

    library: ClassVar[str] = ""
    """The library that loads a stage folder as it is, by the Hub's name; empty where raychain alone does."""
    pipeline: ClassVar[str] = ""
    """What the models are for, by the Hub's name (`pipeline_tag`); empty where it has none."""

    def __init__(self, task: Task) -> None:
        self.task = task

    @abstractmethod
    def config(self, model: str) -> Config:
        """The configuration of a model by its name. Raises UnknownModelError for names that are none of its models."""

    def known(self) -> Sequence[str]:
        """Names of its models, of which messages suggest the nearest, and which `family`'s patterns may stand for."""
        return ()

    @abstractmethod
    def native_size(self, config: Config) -> int:
        """The input size that the model has where the experiment names none."""

    @abstractmethod
    def build(self, config: Config, *, size: int, seed: int, device: str | torch.device = "cpu") -> nn.Module:
        """A model in fp32 with random weights that follow from the seed alone, the same on every device.

        On `device="meta"` there are shapes only. Raises ValueError where the model does not take inputs of that size.
        """

    @abstractmethod
    def objective(self, model: nn.Module, config: Config, teacher: Config | None = None) -> Objective:
        """What is trained: the model with its loss, and with a projector to the features of a model of the
        configuration `teacher` where it has one.
        """

    @abstractmethod
    def survey(self, addresses: Sequence[str], data: Data, cache: Path, where: str) -> list[Shard]:
        """The shards at the addresses with their identities and counts of samples; `cache` keeps counts.

        Raises InputError, naming the option `where`, for files that cannot be read or hold no sample.
        """

    @abstractmethod
    def reader(self, data: Data, config: Config, size: int, samples: int) -> Reader:
        """What turns shards with `samples` samples in all into batches for a model."""

    @abstractmethod
    def example(self, config: Config, size: int, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """A batch of `count` random samples, as `reader` gives it."""

    def adapt(self, model: nn.Module, config: Config, size: int) -> nn.Module:  # noqa: ARG002 - for subclasses
        """The model for inputs of another size: itself, or a copy. A teacher reads what its student reads."""
        return model

    def describe(self, model: nn.Module) -> ModelDescription:
        """The axes of every parameter, which growth follows. Raises UndescribedError for unknown architectures."""
        from raychain.models.architectures import describe

        return describe(model)

    def measure(self, name: str, config: Config, size: int) -> ModelSize:
        """Parameters, forward MACs and activations of the model's parts, counted on shapes alone.

        Raises ValueError for a model that cannot be trained on samples of that size; it is what a chain is checked by.
        """
        from raychain.planning.macs import ModelSize, whole_size

        objective = self.objective(self.build(config, size=size, seed=0, device="meta"), config).to("meta")
        part = whole_size(objective.model, objective.encode, self.example(config, size, 1))
        return ModelSize(name, {"model": part}, principal="model")

    def items(self, data: Data) -> dict[str, float]:  # noqa: ARG002 - for subclasses
        """How many inputs of each part (`ModelSize.parts`) a sample has."""
        return {"model": 1}

    def normalisation(self, model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:  # noqa: ARG002
        """Mean and standard deviation by which a picture's channels, 0 … 1, are normalised when it is evaluated."""
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def resizing(self, config: Config) -> Resizing:  # noqa: ARG002 - for subclasses
        """How pictures get to the model's size when it is evaluated."""
        return Resizing()

    @property
    def classes(self) -> int | None:
        """How many classes its models tell apart; None: they have no classes."""
        return None

    def tokenizer(self, config: Config) -> Tokenizer | None:  # noqa: ARG002 - for subclasses
        """What turns texts into the model's token ids; None for models without texts."""
        return None

    def tokens(self) -> Words | None:
        """What turns text into the ids that language models read; None for models that read none."""
        return None

    @property
    def sample_tokens(self) -> int:
        """Tokens of a sample, in which lengths can be given and rates are told; 0 where samples are no text."""
        return 0

    def adam(self, config: Config) -> tuple[tuple[float, float], float]:  # noqa: ARG002 - for subclasses
        """AdamW's betas and eps where the recipe has none."""
        return (0.9, 0.999), 1e-8

    def save(self, folder: Path, model: nn.Module, config: Config, size: int) -> None:
        """Writes the model to a folder, as the libraries that people use with it load it."""
        document = {"paradigm": self.name, "config": dict(config), "size": size}
        (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n")
        save_file(plain(model.state_dict()), folder / "model.safetensors")

    def load(self, folder: Path) -> nn.Module:
        """The model of a folder that `save` wrote, in fp32 on the CPU."""
        document = json.loads((folder / "config.json").read_text())
        model = self.build(document["config"], size=document["size"], seed=0)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model

    def model_in(self, path: Path, called: str) -> str:  # noqa: ARG002 - for subclasses
        """The name of the model in a checkpoint, empty where it does not say; `called` is the name in its `stage.json`,
        empty without one. Raises ValueError for what is no checkpoint.
        """
        return called

    def read(self, path: Path, model: str) -> Read:
        """A checkpoint that somebody has already, of the model with that name. Raises ValueError where it is none.

        This reads folders that `save` wrote; paradigms whose models come in other forms too replace it.
        """
        if missing := [name for name in self.files if not (path / name).is_file()]:
            raise ValueError(f"{path} is no folder with {' and '.join(self.files)}: it lacks {missing[0]}")
        return Read(self.load(path), self.config(model))

    def between(self, small: str, large: str, ratio: float, head_dim: int | None = None) -> str:  # noqa: ARG002
        """Makes a model between two by their names, with `ratio` times as many parameters in the principal part
        (`ModelSize.principal`) as the smaller has. Returns its name, which `config` knows from then on in this process.

        Paradigms with a rule for it replace this. It gives the same model whenever it is asked, one that grows from the
        smaller and into the larger. `head_dim` is the width that attention heads are to have. Raises GenerationError.
        """
        raise GenerationError(f"a paradigm with a rule for models between two, which {self.name} has not",
                              "name the models that there are")  # fmt: skip

    def inherited(self, config: Config, before: Config) -> Config:  # noqa: ARG002 - for subclasses
        """The configuration of a model that grows from one of the configuration `before`: its own, with whatever of
        the other's its weights rely on.
        """
        return config


def plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as safetensors takes them: on the CPU and contiguous."""
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


__all__ = ["Columns", "Config", "Objective", "Paradigm", "Read", "Task", "initialised", "plain"]
