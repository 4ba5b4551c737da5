"""The chains of models that a search may try."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from raychain.config.experiment import Experiment, Transfer
from raychain.config.search import Search
from raychain.config.search import Space as Settings
from raychain.errors import InputError
from raychain.models import UnknownModelError, matching_models
from raychain.paradigms.generating import generated_models
from raychain.planning.macs import ModelSize
from raychain.planning.principles import ratio_excess
from raychain.runs.generated import apart, generated

ARROW = " → "
MOST_CHAINS = 4096
"""Chains that a space may have."""
Chain = tuple[str, ...]
"""Models, smallest first."""


def models_of(experiment: Experiment, own: Settings) -> tuple[Chain, str]:
    """The names to choose from, and the option that has them. Raises InputError."""
    where = "search.space.generate"
    made = [generated_models(experiment.task, generate, where) for generate in own.generate]
    names = own.models or ()
    if not names and not made:
        names = experiment.family or tuple(stage.model for stage in experiment.chain)
    if names:
        where = "search.space.models" if own.models else "family" if experiment.family else "chain"
    try:
        matched = matching_models(names)
    except (UnknownModelError, ValueError) as error:
        raise InputError(where, ", ".join(names), str(error), "correct the name or pattern") from None
    return tuple(dict.fromkeys([*matched, *itertools.chain(*made)])), where


def check_stages(experiment: Experiment) -> None:
    """Whether the experiment's chain has models and lengths alone. Raises InputError."""
    for index, stage in enumerate(experiment.chain):
        if origin := stage.checkpoint or (stage.start and stage.start.checkpoint):
            option = "checkpoint" if stage.checkpoint else "start"
            raise InputError(f"chain.{index}.{option}", origin, "a chain of models that the search trains itself",
                             "leave it out; raychain run trains chains with checkpoints")  # fmt: skip
        own = stage.model_fields_set - {"model", "epochs"}
        if own:
            raise InputError(
                f"chain.{index}.{min(own)}",
                getattr(stage, min(own)),
                "only model and epochs in the chain of an experiment that is searched",
                "set it for all stages in `train`, for grown ones in `transfer`",
            )


def chains_of(sizes: Sequence[ModelSize], search: Search, where: str) -> tuple[Chain, ...]:
    """Subsets that end with the largest model and keep the lengths and ratios."""
    *others, largest = sizes
    wanted = search.space.lengths or range(2, len(sizes) + 1)
    if len(sizes) < 2:
        raise InputError(where, largest.name, "at least two models", "add models to search.space.models")
    possible = [count for count in wanted if count <= len(sizes)]
    if not possible:
        given = ", ".join(map(str, wanted))
        raise InputError("search.space.lengths", given, f"at most the {len(sizes)} models there are",
                         f"set it to {len(sizes)}, or add models")  # fmt: skip
    if sum(math.comb(len(others), count - 1) for count in possible) > MOST_CHAINS:
        raise InputError(where, f"{len(sizes)} models", f"at most {MOST_CHAINS} chains", "leave some models out, "
                         "or set search.space.lengths")  # fmt: skip
    found = [
        (*chosen, largest) for count in possible for chosen in itertools.combinations(others, count - 1)
    ]  # fmt: skip
    bounds = search.space.ratios
    if bounds is None:
        return tuple(tuple(size.name for size in chain) for chain in found)

    def ratios(chain: Sequence[ModelSize]) -> list[float]:
        return [b.principal_params / a.principal_params for a, b in itertools.pairwise(chain)]

    def excess(chain: Sequence[ModelSize]) -> float:
        return sum(ratio_excess(ratio, bounds) for ratio in ratios(chain))

    kept = tuple(tuple(size.name for size in chain) for chain in found if excess(chain) == 0)
    if not kept:
        near = min(found, key=excess)
        has = ratios(near)
        low, high = math.floor(10 * min(has)) / 10, math.ceil(10 * max(has)) / 10
        raise InputError(
            "search.space.ratios",
            f"[{bounds[0]:g}, {bounds[1]:g}]",
            "bounds that some chain keeps",
            f"the nearest is {ARROW.join(size.name for size in near)}: allow [{min(low, bounds[0]):g}, "
            f"{max(high, bounds[1]):g}]",
        )
    return kept


def growing(experiment: Experiment, chains: Sequence[Chain], transfers: Iterable[Transfer]) -> tuple[Chain, ...]:
    """The chains whose neighbours grow into one another under every operator, generated models that do not grow apart.

    Raises InputError for a pair without a generated model that does not grow, and where no chain is left.
    """
    pairs = sorted({pair for chain in chains for pair in itertools.pairwise(chain)})
    refused = apart(experiment, pairs, transfers, generated(experiment))
    found = tuple(chain for chain in chains if not refused.keys() & set(itertools.pairwise(chain)))
    if not found:
        raise next(iter(refused.values()))
    return found
