"""Causal language models as a paradigm: Llama, Qwen3 and GPT-2 of transformers', in folders that it loads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from pydantic import Field, field_validator
from torch import nn

from raychain.core.json import Json
from raychain.data.shards import Shard
from raychain.data.token_files import surveyed
from raychain.data.token_rows import TokenReader
from raychain.data.tokens import BYTES, END, FILE, Tokenizer, bytes_content, read_tokenizer
from raychain.errors import InputError
from raychain.models.architectures import ModelDescription
from raychain.models.language_folders import CONFIG, TOKENIZER_CONFIG, WEIGHTS, load_language
from raychain.models.registry import add_transformers
from raychain.paradigms.base import Config, Paradigm, Read
from raychain.paradigms.lm import axes, costs, models
from raychain.paradigms.lm.objective import LanguageObjective
from raychain.paradigms.objective import Objective, Projector
from raychain.paradigms.task import Task
from raychain.planning.macs import ModelSize

if TYPE_CHECKING:
    from raychain.config.data import Data

GENERATION = "generation_config.json"
_WIDTH = {"gpt2": "n_embd"}


class LanguageTask(Task):
    """`task: {paradigm: lm}`."""

    tokenizer: str = BYTES
    """`bytes`, or the address of a `tokenizer.json` of Hugging Face's tokenizers or of a folder with one; `raychain
    data tokenize` trains one. All models of a chain share it."""
    end: str = END
    """The token that stands between documents."""
    length: int = Field(256, ge=8, le=2**17)
    """Tokens of a sample; models may have been made for longer ones."""
    text: str = "text"
    """What the text is called in JSON lines, parquet tables and JSON members of tar files."""

    @field_validator("tokenizer")
    @classmethod
    def _absolute(cls, address: str) -> str:
        """A path from where the experiment was started; Ray's workers have another working directory."""
        return address if address == BYTES or "://" in address else str(Path(address).expanduser().absolute())

    @property
    def identity(self) -> Json:
        """The rest is in what the reader says of itself, by content."""
        return {"paradigm": self.paradigm}


class Language(Paradigm):
    """The next token, learned from text or from files of tokens."""

    name, options = "lm", LanguageTask
    samples = "samples"
    takes = frozenset({"tokens"})
    files = (CONFIG, WEIGHTS)
    library, pipeline = "transformers", "text-generation"
    task: LanguageTask

    def config(self, model: str) -> Config:
        """The model's own vocabulary, else the tokeniser's."""
        found = models.configuration(model)
        return found if "vocab_size" in found else {**found, "vocab_size": self._tokenizer().size}

    def known(self) -> Sequence[str]:
        return models.names()

    def native_size(self, config: Config) -> int:  # noqa: ARG002 - as in base
        return self.task.length

    @property
    def sample_tokens(self) -> int:
        return self.task.length

    def _tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.task.tokenizer, self.task.end)

    def tokens(self) -> Tokenizer:
        return self._tokenizer()

    def build(self, config: Config, *, size: int, seed: int, device: str | torch.device = "cpu") -> nn.Module:
        if size != self.task.length:
            raise ValueError(f"samples are of {self.task.length} tokens, as task.length says: leave image_size out")
        if (most := models.longest(config)) < size:
            raise ValueError(f"it reads at most {most:,} tokens at a time: lower task.length, which is {size:,}")
        model: nn.Module = models.build(config, seed=seed, device=device)
        return model

    def describe(self, model: nn.Module) -> ModelDescription:
        return axes.describe(model)

    def objective(self, model: nn.Module, config: Config, teacher: Config | None = None) -> Objective:
        sizes = {"hidden": (_width(config), _width(teacher))} if teacher is not None else {}
        return LanguageObjective(model, Projector(sizes) if sizes else None)

    def survey(self, addresses: Sequence[str], data: Data, cache: Path, where: str) -> list[Shard]:
        for option in ("crop", "store", "image_size", "demo"):
            if (given := getattr(data, option)) is not None:
                raise InputError(f"data.{option}", given, "nothing: text is no picture", "leave it out")
        options = {"captions": bool(data.captions.model_fields_set), "key_split": data.key_split != "first"}
        for option in (name for name, given in options.items() if given):
            raise InputError(f"data.{option}", getattr(data, option), "nothing: text has no captions",
                             "leave it out; task.text says what text is called in JSON and tables")  # fmt: skip
        return surveyed(addresses, self.task.text, self._tokenizer(), self.task.length, cache, where)

    def reader(self, data: Data, config: Config, size: int, samples: int) -> TokenReader:  # noqa: ARG002 - as in base
        tokenizer = self._tokenizer()
        if tokenizer.size > config["vocab_size"]:
            raise InputError("task.tokenizer", f"{self.task.tokenizer} with {tokenizer.size:,} tokens",
                             f"at most the {config['vocab_size']:,} of the model's table",
                             "give the model's own tokenizer, or another model")  # fmt: skip
        return TokenReader(tokenizer, self.task.text, size)

    def example(self, config: Config, size: int, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
        rng = torch.Generator().manual_seed(seed)
        return {
            "tokens": torch.randint(0, int(config["vocab_size"]), (count, size + 1), generator=rng),
            "seed": torch.randint(0, 2**62, (count,), generator=rng),
        }

    def measure(self, name: str, config: Config, size: int) -> ModelSize:
        self.build(config, size=size, seed=0, device="meta")
        return costs.measured(name, config, size)

    def items(self, data: Data) -> dict[str, float]:  # noqa: ARG002 - as in base
        return {costs.DECODER: 1, costs.TOKENS: 1}

    def adam(self, config: Config) -> tuple[tuple[float, float], float]:  # noqa: ARG002 - as in base
        return (0.9, 0.95), 1e-8

    def save(self, folder: Path, model: nn.Module, config: Config, size: int) -> None:  # noqa: ARG002 - as in base
        """A folder that unmodified transformers loads by `from_pretrained`, model and tokenizer."""
        tokenizer, saved = self._tokenizer(), cast(Any, model)
        saved.save_pretrained(folder, max_shard_size="100TB")
        end = {"bos_token_id": tokenizer.end, "eos_token_id": tokenizer.end}
        for name in (CONFIG, GENERATION):
            path = folder / name
            path.write_text(json.dumps({**json.loads(path.read_text()), **end}, indent=2) + "\n")
        content = bytes_content() if tokenizer.address == BYTES else tokenizer.content
        (folder / FILE).write_text(content)
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.end_token,
                     "bos_token": tokenizer.end_token, "model_max_length": size}  # fmt: skip
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(described, indent=2) + "\n")

    def load(self, folder: Path) -> nn.Module:
        found: nn.Module = load_language(folder)
        return found

    def model_in(self, path: Path, called: str) -> str:
        """A known name of the model that config.json describes, or one made of `called` or of the folder's name, by
        which it is known from then on.
        """
        described = models.checked(json.loads((path / CONFIG).read_text()), str(path))
        plain = called or re.sub(r"[^A-Za-z0-9._-]", "_", path.name).lstrip("._-")[:80] or "checkpoint"
        name, number = plain, 1
        while name in models.names() and _differs(described, self.config(name)):
            number += 1
            name = f"{plain}-{number}"
        if name not in models.names():
            add_transformers(described, name)
        return name

    def read(self, path: Path, model: str) -> Read:
        found, wanted = super().read(path, model), self.config(model)
        described = models.checked(json.loads((path / CONFIG).read_text()), str(path))
        if other := _differs(described, wanted):
            raise ValueError(f"its {CONFIG} is of another model than {model}: {other}")
        return found


def _width(config: Config) -> int:
    return int(config[_WIDTH.get(config["model_type"], "hidden_size")])


def _differs(config: Config, other: Config) -> str:
    """The first key in which two configurations are of different models; empty where they are of the same."""
    one, two = (models.library_config(found).to_dict() for found in (config, other))
    for key in sorted({*one, *two} - models.SILENT):
        if one.get(key) != two.get(key):
            return f"{key} is {one.get(key)}, not {two.get(key)}"
    return ""
