"""Models between two known ones: a ladder for every expansion ratio that a user asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator

from raychain.errors import InputError
from raychain.models.generation import GenerationError
from raychain.paradigms import make_paradigm, usable_size
from raychain.paradigms.task import Task
from raychain.schema.generate import Generate


def generated_models(task: Task, generate: Generate, where: str) -> tuple[str, ...]:
    """The names of the two models and of those made between them, smallest first. From then on they are known in this
    process, as those of `use_models` are.

    Raises InputError, naming the option `where`, for models or ratios that none can be made of.
    """
    paradigm, (small, large) = make_paradigm(task), generate.between
    given = " … ".join(generate.between)
    least, most = (usable_size(task, name, None, f"{where}.between").principal_params for name in generate.between)
    if least >= most:
        raise InputError(f"{where}.between", given, "a smaller and a larger model", "write the smaller one first")
    found = {small: least}
    for ratio in generate.ratios:
        if ratio >= most / least:
            raise InputError(f"{where}.ratios", f"{ratio:g}", f"ratios below {most / least:.3g}, which is that of the "
                             f"two models", "leave it out, or name models further apart")  # fmt: skip
        for times in _rungs(ratio, most / least):
            try:
                name = paradigm.between(small, large, times, generate.head_dim)
            except GenerationError as error:
                at = f"{where}.{error.option}"
                value = {"ratios": f"{ratio:g}", "head_dim": str(generate.head_dim)}.get(error.option, given)
                raise InputError(at, value, error.allowed, error.fix) from None
            found[name] = usable_size(task, name, None, f"{where}.ratios").principal_params
    return tuple(sorted(found, key=lambda name: (found[name], name))) + (() if large in found else (large,))


def _rungs(ratio: float, whole: float) -> Iterator[float]:
    """A ratio, and its powers from which it is more than half a step, as a logarithm, to `whole`."""
    yield ratio
    for power in range(2, 1 + math.floor(math.log(whole) / math.log(ratio))):
        if ratio ** (power + 0.5) <= whole:
            yield ratio**power
