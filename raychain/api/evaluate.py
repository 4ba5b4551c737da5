"""`raychain.evaluate`: measures one checkpoint by any number of evaluators, with clip_benchmark's numbers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raychain.core.json import Json
from raychain.core.storage import local_path
from raychain.errors import InputError, RunFailed
from raychain.terminal.counting import CountingLine

if TYPE_CHECKING:
    from raychain.evaluators.config import Evaluate
    from raychain.evaluators.finding import Task

CAPTIONS = ("txt|lines",)
CACHE = "~/.cache/raychain"


def evaluate(
    checkpoint: str,
    data: str | Sequence[str] = (),
    *,
    evaluators: str | Mapping[str, Any] | None = None,
    root: str | None = None,
    model: str | None = None,
    captions: Sequence[str] = CAPTIONS,
    key_split: Literal["first", "last"] = "first",
    device: str | None = None,
    batch_size: int = 256,
    cache: str = CACHE,
    budget: int | None = None,
    models: str | None = None,
) -> Json:
    """Measures a checkpoint in fp32 on each of the addresses `data` and by `evaluators`; returns what `--json` prints.

    `checkpoint` is what `read_checkpoint` takes, or a plain timm model (a folder as timm saves it, or a weights file),
    which is measured by evaluators of pictures alone; also on object storage. `model` names the architecture of a
    weights file, whose names the folder of model configs `models` may add to. Which tasks an address holds,
    `raychain.evaluators.finding` tells; `captions` and `key_split` are as `data.captions.keys` and `data.key_split` of
    a run. `evaluators` is what stands under `evaluate:` of an experiment, or the name of a file of evaluators, in
    whose addresses `root` stands for `{root}`. Decoded pictures are kept in `cache`, at most `budget` bytes (default
    64 GiB).

    Returns {`checkpoint`, `model`, `params`, `image_size`, `device`, `seconds`, `results`: [{`data`, `task`,
    `pictures`, …, `metrics`: {`zero_shot_top1`, …, `map`, `i2t_r1`, …} in percent}], and of `evaluators` `metrics`:
    {`NAME/METRIC`: value} and `definitions`: {`NAME/METRIC`: {`unit`, `best`, …}}}.

    Raises InputError for wrong arguments, RunFailed where a shard cannot be read or features are not finite.
    """
    from raychain.data.cache import ShardCache
    from raychain.evaluators.context import Context
    from raychain.evaluators.evaluator import HeldOut, Setting
    from raychain.evaluators.finding import find_tasks
    from raychain.evaluators.measure import measure
    from raychain.evaluators.metrics import FORMER, written_down
    from raychain.evaluators.registry import check_takes
    from raychain.evaluators.subject import read_subject
    from raychain.evaluators.suite import resolve_suite
    from raychain.models.registry import use_models

    started, addresses = time.monotonic(), [data] if isinstance(data, str) else list(data)
    where = _device(device)
    _check_captions(captions)
    named = _named(evaluators, root)
    if not addresses and not named.named:
        raise InputError("raychain evaluate", "nothing to measure on", "--data, --evaluators or both", "give one")
    use_models(models, "--models")
    subject, folder = read_subject(checkpoint, model), _cache_folder(cache)
    check_takes(named.named, subject.takes, "evaluators")
    if addresses and "texts" not in subject.takes:
        raise InputError("--data", addresses[0], "--evaluators with a linear_probe, for a model that takes no texts",
                         "leave --data out")  # fmt: skip
    tasks = [(a, task) for a in addresses for task in find_tasks(a, captions, folder, "--data", key_split)]
    suite = resolve_suite(named, Setting(folder, tuple(captions), key_split, subject.classes))
    measurable = subject.model.to(where)

    def measured(held_out: HeldOut, what: str) -> dict[str, float]:
        try:
            with CountingLine(f"{what}, samples") as line:
                context = Context(
                    cache=ShardCache(folder, budget or 64 * 2**30),
                    tokenize=subject.tokenize,
                    image_size=subject.image_size,
                    mean=subject.mean,
                    std=subject.std,
                    device=where,
                    batch_size=batch_size,
                    resizing=subject.resizing,
                    words=subject.words,
                    progress=partial(_show, line, held_out.samples),
                )
                return measure(measurable, held_out, context)
        except (OSError, FloatingPointError) as error:
            raise RunFailed(str(error)) from None

    results = []
    for address, task in tasks:
        described = _described(task)
        found = measured(task, described["task"])
        former = [d for d in FORMER if d.kind == described["task"]]
        metrics = {d.former: found[d.name.partition("/")[2]] for d in former} or found
        results.append({"data": address, **described, "metrics": metrics})
    of_suite = {e.digest: measured(e.held_out, e.name) for e in suite.evaluations}
    return {
        "checkpoint": checkpoint,
        "model": model,
        "params": sum(parameter.numel() for parameter in measurable.parameters()),
        "image_size": None if subject.words else subject.image_size,
        **({"tokens": subject.image_size} if subject.words else {}),
        "device": str(where),
        "seconds": round(time.monotonic() - started, 2),
        "results": results,
        **({"metrics": suite.metrics(of_suite), "definitions": written_down(suite.definitions)} if of_suite else {}),
    }


def _named(evaluators: str | Mapping[str, Any] | None, root: str | None) -> Evaluate:
    """The evaluators of a file or of a mapping. Raises InputError."""
    from pydantic import ValidationError

    from raychain.evaluators.config import Evaluate
    from raychain.schema.problems import WHERE, explain

    given = {"file": evaluators} if isinstance(evaluators, str) else dict(evaluators or {})
    if root is not None:
        if not evaluators:
            raise InputError("--root", root, "the address for {root} of --evaluators", "give --evaluators, or leave it")
        given["root"] = root
    try:
        return Evaluate.model_validate(given)
    except ValidationError as error:
        first, *more = (
            InputError(".".join(map(str, ("evaluators", *p.where))), p.given, p.allowed, p.fix.replace(WHERE, "it"))
            for p in explain(error, Evaluate)
        )
        raise InputError(*first.args, *more) from None


def _show(line: CountingLine, pictures: int, seen: int) -> None:
    line.show(seen, pictures)


def _device(name: str | None) -> Any:
    import torch

    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError("--device", chosen, "cpu, or a device that torch finds here", reason) from None


def _check_captions(keys: Sequence[str]) -> None:
    from raychain.schema.captions import caption_key

    for key in keys:
        try:
            caption_key(key)
        except ValueError as error:
            raise InputError("--captions", key, str(error), "correct the key") from None


def _cache_folder(cache: str) -> Path:
    folder = local_path(cache, "--cache")
    try:
        (folder / "counts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("--cache", cache, f"a folder that can be written ({error})", "give another folder") from None
    return folder


def _described(task: Task) -> Json:
    from raychain.evaluators.data import MultilabelData, RetrievalData

    if isinstance(task, RetrievalData):
        return {"task": "retrieval", "pictures": task.samples, "captions": list(task.caption_keys)}
    kind = "zero_shot_multilabel" if isinstance(task, MultilabelData) else "zero_shot"
    return {"task": kind, "pictures": task.samples, "classes": len(task.classes), "templates": len(task.templates)}
