"""`raychain init`: writes a first experiment file, from flags or from answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from raychain.cli.completing import models
from raychain.errors import InputError, nearest
from raychain.terminal import delivered, say

if TYPE_CHECKING:  # torch is imported by what looks at the data, not by --help
    from raychain.starting.draft import Wishes
    from raychain.starting.probe import Held

Answer = TypeVar("Answer", str, int, float)
DEMO = "data/demo-quick/train"


def init_command(
    file: Annotated[Path, typer.Argument(help="Experiment file to write; it must not exist.")] = Path(
        "experiment.yaml"
    ),
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Training shards: folder, glob, braces, s3://…; may be repeated.")
    ] = None,
    captions: Annotated[
        list[str] | None, typer.Option("--captions", help="As data.captions.keys; may be repeated. Default: found.")
    ] = None,
    per_image: Annotated[int | None, typer.Option(min=1, help="Captions of a picture in each step's loss.")] = None,
    family: Annotated[
        list[str] | None,
        typer.Option("--family", help="Models from which the planner chooses; may be repeated.", autocompletion=models),
    ] = None,
    chain: Annotated[
        list[str] | None, typer.Option("--chain", help="MODEL:EPOCHS, instead of --family; repeated, small to large.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(min=0.01, help="Epochs of a family's first model.")] = None,
    budget: Annotated[
        str | None, typer.Option(help='MACs of the chain: "30 %" of the largest alone, "9 EMACs".')
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="Workers with a GPU each; 0: on CPUs.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers without GPUs.")] = None,
    batch: Annotated[int | None, typer.Option(min=2, help="Samples a step over all workers.")] = None,
    zero_shot: Annotated[
        str | None, typer.Option(help="Held-out pictures with classes: clip_benchmark folder.")
    ] = None,
    retrieval: Annotated[
        list[str] | None, typer.Option("--retrieval", help="Held-out pairs: shards; may be repeated.")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option("--held-out", help="Held-out data of classify and lm; may be repeated.")
    ] = None,
    paradigm: Annotated[str, typer.Option(help="What is learned, as task.paradigm.")] = "clip",
    task: Annotated[
        list[str] | None, typer.Option("--task", help="KEY=VALUE: an option of the paradigm; may be repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; default: the file's.")] = None,
    storage: Annotated[str, typer.Option(help="Folder or address of the runs.")] = "runs",
    configs: Annotated[
        str | None, typer.Option("--models", help="Folder of open_clip model configs: NAME.json.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: flags, and what is found for the rest.")
    ] = False,
) -> None:
    """Look at the data, ask what cannot be known, write a commented experiment file, and print its plan.

    Without a terminal nothing is asked. Nothing is trained or started.
    """
    if file.suffix not in (".yaml", ".yml"):
        raise InputError("FILE", file, "a name that ends in .yaml", f"raychain init {file}.yaml")
    if file.exists():
        raise InputError("FILE", file, "a file that does not exist: none is overwritten", "give another name")
    asking = not yes and sys.stdin.isatty() and sys.stderr.isatty()
    addresses = tuple(data or (_ask("Training shards (folder, glob or address)", DEMO) if asking else "",))
    addresses = tuple(address for address in addresses if address)
    if not addresses:
        fix = "give --data data/mine, or make some: raychain data demo data/demo-quick --names 40 --pictures 2000"
        raise InputError("--data", "nothing", "the address of training shards", fix)
    if family and chain:
        raise InputError("--chain", f"also --family {family[0]}", "one of them", "leave out the other")
    from raychain.starting.draft import Wishes, usual_batch
    from raychain.starting.kinds import kind_of
    from raychain.starting.probe import Held, probe

    _check_paradigm(paradigm)
    kind = kind_of(paradigm)
    held = probe(addresses) if kind.looks else Held()
    if kind.looks:
        say(str(held))
    if missing := kind.missing(held):
        raise InputError("--data", addresses[0], f"samples that {paradigm} learns from", f"they have {missing}")
    gpus = _gpus(gpus, workers, asking)
    if workers is None:
        workers = gpus or (_ask("Workers (processes on CPUs)", _usual_workers()) if asking else _usual_workers())
    chosen = tuple(chain or family or ())
    if not chosen:
        proposed = kind.family(held, bool(gpus))
        answer = _ask("Models to choose a chain from", proposed or None) if asking else proposed
        chosen = (answer,) if answer else ()
    if not chosen:
        raise InputError("--family", "nothing", f"models of the paradigm {paradigm}", "give --family or --chain")
    if not chain:
        few = None if gpus else 8.0
        if asking and epochs is None:
            epochs = _ask("Epochs of the first model", few or 128.0)
        if asking and budget is None:
            budget = _ask('Most MACs of the chain ("30 %" of the largest alone; empty: no limit)', "") or None
        epochs = few if epochs is None else epochs
    if kind.captions:
        zero_shot, retrieval = _pairs_held_out(addresses[0], zero_shot, retrieval, asking)
    elif not held_out and kind.looks:
        held_out = _held_out(addresses[0], asking)
    options = _options(task or ())
    if paradigm == "classify" and "classes" not in dict(options):
        options = (*options, ("classes", _classes(addresses[0], held.classes)))
    keys = tuple(captions or (key.name for key in held.keys))
    wishes = Wishes(
        name=name or _run_name(file),
        data=addresses,
        models=tuple(chosen),
        paradigm=paradigm,
        task=options,
        captions=keys,
        per_image=per_image or _usual_captions(held, bool(gpus)),
        epochs=epochs,
        budget=budget,
        workers=workers,
        gpus=bool(gpus),
        batch=batch or usual_batch(held, bool(gpus)),
        zero_shot=zero_shot or None,
        retrieval=tuple(address for address in retrieval or () if address),
        held_out=tuple(held_out or ()),
        storage=storage,
        configs=configs,
    )
    _write(file, wishes, held)


def _write(file: Path, wishes: Wishes, held: Held) -> None:
    """Checks the experiment, writes it, and prints what it costs."""
    from raychain.api.plan import plan
    from raychain.api.run import resolved
    from raychain.config import opened
    from raychain.config.loading import validate
    from raychain.reporting.plan_table import plan_table
    from raychain.runs.checks import check_chain, check_evaluators, check_precision
    from raychain.schema.yaml_text import read_yaml
    from raychain.starting.draft import draft

    text = draft(wishes, held)
    tree = read_yaml(text)
    estimated = tree
    if held.samples:  # the plan reads no shard for it
        estimated = {**tree, "data": {**tree["data"], "samples": held.samples}}
    experiment = opened(validate(estimated, "raychain init"))
    costs = plan(experiment)
    checked = resolved(experiment)
    check_chain(checked)
    check_precision(checked)
    check_evaluators(checked)
    try:
        with file.open("x", encoding="utf-8") as opened_file:
            opened_file.write(text)
    except OSError as error:
        raise InputError("FILE", file, "a new file in a folder that can be written", str(error)) from None
    say(f"\n{file}:\n\n{text}", sys.stdout)
    plan_table(costs)
    guessed = "Samples are estimated here. " if held.samples else ""
    say(f"\n{guessed}Next:\n  raychain run {file} --dry-run   counts them and checks everything\n"
        f"  raychain run {file}", sys.stdout)  # fmt: skip
    delivered()


def _ask(question: str, default: Answer | None) -> Answer:
    """What the user answers, on stderr as all that is no result."""
    answer: Answer = typer.prompt(
        question, default=default, err=True, type=type(default) if default is not None else str
    )
    return answer.strip() if isinstance(answer, str) else answer


def _check_paradigm(paradigm: str) -> None:
    from raychain.paradigms import PARADIGMS

    if paradigm not in PARADIGMS:
        known = list(PARADIGMS)
        fix = nearest(paradigm, known, "install the package that has it")
        raise InputError("--paradigm", paradigm, ", ".join(known), fix)


def _pairs_held_out(
    address: str, zero_shot: str | None, retrieval: list[str] | None, asking: bool
) -> tuple[str | None, list[str]]:
    """Held-out data for pictures and captions: as given, else as it lies beside the training shards."""
    from raychain.starting.beside import beside

    found = beside(address)
    if zero_shot is None:
        zero_shot = found.zero_shot or ""
        zero_shot = _ask("Held-out pictures with classes (empty: none)", zero_shot) if asking else zero_shot
    if not retrieval:
        pairs = found.retrieval or ""
        retrieval = [_ask("Held-out pairs (empty: none)", pairs) if asking else pairs]
    return zero_shot, retrieval


def _held_out(address: str, asking: bool) -> list[str]:
    from raychain.starting.beside import held_out

    found = held_out(address) or ""
    found = _ask("Held-out data (empty: none)", found) if asking else found
    return [found] if found else []


def _classes(address: str, seen: int) -> str:
    """How many classes there are, as `classnames.txt` says. Raises InputError."""
    from raychain.starting.beside import class_names

    known = class_names(address)
    if not known:
        raise InputError("--task", "no classes", "--task classes=N, or classnames.txt beside the shards, a name a line",
                         f"count them: what was read had {seen}")  # fmt: skip
    return str(known)


def _options(given: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """What `--task` says. Raises InputError."""
    from raychain.schema.yaml_text import YamlError, read_yaml

    found = []
    for option in given:
        key, equals, value = option.partition("=")
        try:
            known = bool(equals and key.isidentifier()) and read_yaml(value) is not None
        except YamlError:
            known = False
        if not known or any(c in value for c in "\n#"):
            raise InputError("--task", option, "KEY=VALUE, an option of the paradigm", "such as --task classes=1000")
        found.append((key, value))
    return tuple(found)


def _gpus(given: int | None, workers: int | None, asking: bool) -> int:
    import torch

    if given is not None:
        if given and workers:
            raise InputError("--workers", workers, "not with --gpus, which says how many workers there are",
                             "leave out one of them")  # fmt: skip
        return given
    here = 0 if workers else torch.cuda.device_count()
    return _ask("GPUs, one a worker (0: on CPUs)", here) if asking and not workers else here


def _usual_workers() -> int:
    import os

    return max(1, min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def _usual_captions(held: Held, gpus: bool) -> int:
    from raychain.starting.draft import PUBLISHED

    each = sum(key.captions for key in held.keys)
    return max(1, min(round(each), PUBLISHED)) if gpus else 1


def _run_name(file: Path) -> str:
    import re

    return re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).lstrip("._-") or "experiment"
