"""An experiment file with the reasons beside its values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from raychain.starting.kinds import kind_of
from raychain.starting.probe import Held

PUBLISHED = 7
"""Captions an image in the paper's runs."""
FIRST = 32.0
"""Epochs of the first model, where nothing is published and nobody said."""
FEW_STEPS = 2000
"""Steps of the last stage under which weights half random have trained better than grown ones."""


@dataclass(frozen=True)
class Wishes:
    """What a user said or accepted; the rest of the experiment follows from it and from the data."""

    name: str
    data: tuple[str, ...]
    models: tuple[str, ...]
    """Names or patterns of the family, or stages `MODEL:EPOCHS`."""
    paradigm: str = "clip"
    task: tuple[tuple[str, str], ...] = ()
    """The paradigm's options, in YAML."""
    captions: tuple[str, ...] = ()
    per_image: int = 1
    epochs: float | None = None
    """Epochs of the first model; None: as published."""
    budget: str | None = None
    workers: int = 1
    gpus: bool = False
    batch: int = 1024
    zero_shot: str | None = None
    retrieval: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    """Held-out data of paradigms that have one evaluator."""
    storage: str = "runs"
    configs: str | None = None
    """Folder of the user's own model configurations."""

    @property
    def chain(self) -> list[tuple[str, str]]:
        """Stages, where the models are given as such."""
        pairs = [model.rpartition(":") for model in self.models]
        return [(model, length) for model, _, length in pairs] if all(colon for _, colon, _ in pairs) else []


def usual_batch(held: Held, gpus: bool) -> int:
    """1,024 pairs as published, fewer on CPUs and for data that would give too few steps an epoch."""
    most = 1024 if gpus else 128
    if not held.samples:
        return most
    return max(min(most, 2 ** int(math.log2(max(held.samples / 16, 8)))), 8)


def draft(wishes: Wishes, held: Held) -> str:
    """The file's text."""
    return "\n".join(
        [*_head(wishes, held), *_data(wishes, held), *_models(wishes), *_recipe(wishes, held), *_machines(wishes),
         *_measured(wishes), *_kept(wishes)]
    ) + "\n"  # fmt: skip


def _head(wishes: Wishes, held: Held) -> list[str]:
    lines = ["# Written by `raychain init`. Every key: docs, configuration. What was found in the data:"]
    lines += [f"#   {line}" for line in str(held).splitlines()]
    lines += [f"name: {_text(wishes.name)}  # the run's folder is {_plain(wishes.storage)}/{_plain(wishes.name)}"]
    if wishes.paradigm != "clip" or wishes.task:
        options = "".join(f", {name}: {value}" for name, value in wishes.task)
        lines += [f"task: {{paradigm: {_text(wishes.paradigm)}{options}}}"]
    return lines


def _data(wishes: Wishes, held: Held) -> list[str]:
    lines = ["", "data:", f"  train: {_one_or_more(wishes.data)}"]
    if kind_of(wishes.paradigm).captions:
        lines += [
            f"  captions: {{keys: {_list(wishes.captions)}, per_image: {wishes.per_image}}}"
            "  # per_image: captions of a picture in each step's loss"
        ]
    if held.key_split != "first":
        lines += [f"  key_split: {held.key_split}  # names have dots, so extensions begin at the last one"]
    if held.samples:
        lines += [f"  # samples: {held.samples}  # estimated; shards are counted when it is absent"]
    if held.pictures:
        lines += ["  # crop: [0.9, 1.0]  # random crops of this share of a picture's area; absent: the centre"]
    return lines


def _models(wishes: Wishes) -> list[str]:
    if wishes.chain:
        return ["", "chain:  # from small to large; each starts from the one before",
                *(f"  - {{model: {_text(m)}, epochs: {_text(e)}}}" for m, e in wishes.chain)]  # fmt: skip
    lines = [
        "",
        f"family: {_one_or_more(wishes.models)}  # `raychain plan` shows which chain of these is chosen, and why",
    ]
    allocation, ruled = [], kind_of(wishes.paradigm).captions
    first = wishes.epochs if ruled or wishes.epochs else FIRST
    if first is not None:
        allocation += [f"first: {first:g}"]
    if not ruled:  # the published rules are those of pictures and captions
        allocation += [f"rules: [[{(first or FIRST) / 4:g}, {(first or FIRST) / 8:g}]]"]
    if wishes.budget is not None:
        allocation += [f"budget: {_text(wishes.budget)}"]
    about = "first: epochs of the first model, and what the largest alone is compared at"
    if not ruled:
        about += "; rules: of the second and of the last"
    if allocation:
        lines += [f"allocation: {{{', '.join(allocation)}}}  # {about}"]
    else:
        lines += [f'# allocation: {{first: 32, budget: "30 %"}}  # {about}; budget: of the largest alone']
    return [*lines, *([f"models: {_text(wishes.configs)}"] if wishes.configs else [])]


def _recipe(wishes: Wishes, held: Held) -> list[str]:
    precision = "bf16" if wishes.gpus else "fp32"
    return [
        "",
        f'train: {{global_batch: {wishes.batch}, lr: 1.0e-3, warmup: "10 %", precision: {precision}, seed: 0}}',
        "# What a stage takes from the one before: weights and features. A short last stage (fewer than about",
        f"# {FEW_STEPS:,} steps) has done better from weights half random (0.5), longer ones from exact growth (1).",
        f"transfer: {{shrink: {_shrink(wishes, held)}}}",
    ]


def _shrink(wishes: Wishes, held: Held) -> str:
    lengths = [length for _, length in wishes.chain]
    try:
        last = float(lengths[-1]) if lengths else (wishes.epochs or 128) / 8
    except ValueError:  # in steps or samples
        return "1.0"
    return "0.5" if 0 < last * held.samples / wishes.batch < FEW_STEPS else "1.0"


def _machines(wishes: Wishes) -> list[str]:
    gpus = ", gpus_per_worker: 1" if wishes.gpus else ""
    several = "several nodes need a `storage` that all of them reach"
    return ["", f"compute: {{workers: {wishes.workers}{gpus}}}  # Ray Train workers; {several}"]


def _measured(wishes: Wishes) -> list[str]:
    measured = kind_of(wishes.paradigm).measured
    if not (wishes.zero_shot or wishes.retrieval or (measured and wishes.held_out)):
        example = f"{{held-out: {{type: {measured}, data: data/held-out}}}}"
        if not measured:
            example = '{zero_shot: data/imagenet, retrieval: "data/held-out/*.tar"}'
        return ["", "# Nothing is measured: name held-out data, else nobody knows whether the chain was worth it.",
                f"# evaluate: {example}"]  # fmt: skip
    lines = ["", "evaluate:  # after each stage, on held-out data"]
    if wishes.zero_shot:
        lines += [f"  zero_shot: {_text(wishes.zero_shot)}"]
    if wishes.retrieval:
        lines += [f"  retrieval: {_one_or_more(wishes.retrieval)}"]
    if measured and wishes.held_out:
        lines += [f"  held-out: {{type: {measured}, data: {_one_or_more(wishes.held_out)}}}"]
    return lines


def _kept(wishes: Wishes) -> list[str]:
    return [
        "",
        f"storage: {_text(wishes.storage)}  # a folder or s3://… of runs; the same stage is never trained twice in it",
        "# license: apache-2.0  # what the models' cards say",
    ]


def _one_or_more(values: Sequence[str]) -> str:
    return _text(values[0]) if len(values) == 1 else _list(values)


def _list(values: Sequence[str]) -> str:
    return f"[{', '.join(_text(value) for value in values)}]"


def _text(value: str) -> str:
    """A YAML scalar for a text, also in a list or mapping in brackets."""
    written = yaml.safe_dump([value], default_flow_style=True, width=math.inf, allow_unicode=True)
    return written.strip()[1:-1]


def _plain(text: str) -> str:
    """A text within a comment."""
    return " ".join(text.split())
