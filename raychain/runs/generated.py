"""Generated models in chains: of two that are made for different ratios one may be deeper and the other wider."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

from raychain.config.experiment import Experiment, Stage, Transfer
from raychain.errors import InputError
from raychain.paradigms.generating import generated_models
from raychain.runs.checks import check_growth, check_transfer
from raychain.schema.durations import Duration

Pair = tuple[str, str]
"""Neighbours in a chain."""


def generated(experiment: Experiment) -> frozenset[str]:
    """The names of all models that the experiment has made between others."""
    asked = [(generate, "generate") for generate in experiment.generate]
    if experiment.search:
        asked += [(generate, "search.space.generate") for generate in experiment.search.space.generate]
    names = [set(generated_models(experiment.task, one, where)).difference(one.between) for one, where in asked]
    return frozenset(itertools.chain(*names))


def apart(
    experiment: Experiment, pairs: Collection[Pair], transfers: Iterable[Transfer], made: frozenset[str]
) -> dict[Pair, InputError]:
    """The pairs with a model that is `made` and that do not grow under every one of the transfers, with the reason.

    Raises InputError for any other pair that does not.
    """
    found: dict[Pair, InputError] = {}
    for transfer in transfers:
        check_transfer(transfer)
        for pair in pairs:
            chain = tuple(Stage(model=model, epochs=Duration(1, "epochs")) for model in pair)
            two = experiment.model_copy(update={"chain": chain, "family": None, "transfer": transfer})
            try:
                check_growth(two, 1)
            except InputError as error:
                if not made.intersection(pair):
                    raise
                found[pair] = error
    return found
