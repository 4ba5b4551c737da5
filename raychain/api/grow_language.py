"""`raychain.grow` of a language model: a folder of transformers into one of a larger model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raychain.errors import InputError
from raychain.growth import GrowthError, GrowthReport, check, grow
from raychain.growth.drift import TowerDrift, compared
from raychain.models import UnknownModelError
from raychain.models.checkpoints import CheckpointError
from raychain.models.language_folders import read_language
from raychain.models.next_token import hidden_states
from raychain.paradigms import make_paradigm, make_task, unknown_model
from raychain.training.artifact import write_artifact

TOKENS = 64


def grow_language(
    small: Path, called: str, to: str, folder: Path, width: str, depth: str, seed: int, count: int
) -> tuple[GrowthReport, dict[str, TowerDrift]]:
    """Grows the model of the folder `small` into the one named `to`, and writes it to `folder`, with its tokeniser.

    The drift is that of the logits on `count` random texts. Raises InputError before anything is written.
    """
    try:
        found = read_language(small)
    except CheckpointError as error:
        raise InputError("SMALL", called, "a folder of transformers with model.safetensors and tokenizer.json",
                         str(error)) from None  # fmt: skip
    tokenizer = found.tokenizer
    task = make_task({"paradigm": "lm", "tokenizer": tokenizer.address, "end": tokenizer.end_token,
                      "length": found.length})  # fmt: skip
    paradigm = make_paradigm(task)
    try:
        config = {**paradigm.config(to)}
        if found.config["vocab_size"] >= tokenizer.size == config["vocab_size"]:
            config["vocab_size"] = found.config["vocab_size"]  # tables are often larger than their tokenizer
        wanted = paradigm.build(config, size=found.length, seed=seed, device="meta")
        check(found.model, wanted, width=width, depth=depth, describe=paradigm.describe)
    except UnknownModelError as error:
        raise unknown_model(task, to, error, "--to") from None
    except GrowthError as error:
        allowed = f"a pair that {width} + {depth} can grow"
        raise InputError("raychain grow", f"{called} → {to}", allowed, str(error)) from None
    except ValueError as error:
        raise InputError("--to", to, "a model that reads texts of SMALL's length", str(error)) from None
    large = paradigm.build(config, size=found.length, seed=seed)
    report = grow(found.model, large, width=width, depth=depth, describe=paradigm.describe)
    ids = torch.randint(0, tokenizer.size, (count, min(TOKENS, found.length)),
                        generator=torch.Generator().manual_seed(seed))  # fmt: skip
    before, after = (_logits(model, ids) for model in (found.model, large))
    folder.mkdir(parents=True, exist_ok=True)
    write_artifact(folder, paradigm, large, config, found.length)
    return report, {"logits": compared(before, after)}


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    hidden = hidden_states(model.eval(), ids)
    found: torch.Tensor = hidden @ model.get_output_embeddings().weight.T
    return found.flatten(0, 1)
