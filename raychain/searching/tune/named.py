"""Parts of Tune's that an experiment names: searchers, schedulers, stoppers and callbacks, or classes of one's own."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from raychain.config.search import Named
from raychain.core.json import Json
from raychain.errors import InputError, nearest

SECRET = re.compile(r"(?i)secret|token|passw|credential|api_?key(?!.*file)")
"""Options whose values nobody is to read: search.json has all settings."""
REASON = "it copies weights between trials, and those of one chain mean nothing in another"

POPULATIONS = (
    "ray.tune.schedulers.PopulationBasedTraining",
    "ray.tune.schedulers.PopulationBasedTrainingReplay",
    "ray.tune.schedulers.pb2.PB2",
)


@dataclass(frozen=True)
class Family:
    """Parts of one kind: under which key they stand, what they are, and short names for Tune's own."""

    where: str
    base: type
    names: Mapping[str, str]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Names and why they cannot be."""


SEARCHERS = Family(
    "search.sampler",
    Searcher,
    {
        "ax": "ray.tune.search.ax.AxSearch",
        "bayesopt": "ray.tune.search.bayesopt.BayesOptSearch",
        "bohb": "ray.tune.search.bohb.TuneBOHB",
        "hebo": "ray.tune.search.hebo.HEBOSearch",
        "hyperopt": "ray.tune.search.hyperopt.HyperOptSearch",
        "nevergrad": "ray.tune.search.nevergrad.NevergradSearch",
        "zoopt": "ray.tune.search.zoopt.ZOOptSearch",
    },
)
SCHEDULERS = Family(
    "search.scheduler",
    TrialScheduler,
    {
        "median": "ray.tune.schedulers.MedianStoppingRule",
        "hyperband": "ray.tune.schedulers.HyperBandScheduler",
        "bohb": "ray.tune.schedulers.HyperBandForBOHB",
    },
    dict.fromkeys(("pbt", "pb2", "pbt_replay", *POPULATIONS), REASON),
)
STOPPERS = Family(
    "search.stop",
    Stopper,
    {
        "timeout": "ray.tune.stopper.TimeoutStopper",
        "maximum_iterations": "ray.tune.stopper.MaximumIterationStopper",
        "trial_plateau": "ray.tune.stopper.TrialPlateauStopper",
        "experiment_plateau": "ray.tune.stopper.ExperimentPlateauStopper",
    },
)
CALLBACKS = Family(
    "search.callbacks",
    Callback,
    {
        "wandb": "ray.air.integrations.wandb.WandbLoggerCallback",
        "mlflow": "ray.air.integrations.mlflow.MLflowLoggerCallback",
        "comet": "ray.air.integrations.comet.CometLoggerCallback",
        "aim": "ray.tune.logger.aim.AimLoggerCallback",
    },
)


def make(family: Family, named: Named, others: Mapping[str, str] | None = None, **usual: Any) -> Any:
    """The part with its options, and with those `usual` ones that it takes and that are not given.

    `others` are names that stand for more than a class. Raises InputError.
    """
    kind = _class(family, named.name, others or {})
    if secret := next(filter(SECRET.search, named.options), None):
        raise InputError(f"{family.where}.{secret}", "…", "options that are no secrets: search.json has every setting",
                         "give it in the environment, as WANDB_API_KEY, or by a file, as api_key_file")  # fmt: skip
    takes = inspect.signature(kind).parameters
    everything = any(parameter.kind == parameter.VAR_KEYWORD for parameter in takes.values())
    options: Json = {name: value for name, value in usual.items() if everything or name in takes} | named.options
    try:
        return kind(**options)
    except InputError:
        raise
    except Exception as error:  # a class of somebody else's says in its own way what it wants
        fix = f"correct its options, or install what it needs ({type(error).__name__}: {error})"
        raise InputError(family.where, named.written, f"options that {kind.__name__} takes", fix) from None


def _class(family: Family, name: str, others: Mapping[str, str]) -> type:
    if name in family.refused:
        raise InputError(family.where, name, f"another: {family.refused[name]}", "asha stops chains that are behind")
    known = sorted({*family.names, *others})
    address = family.names.get(name, name)
    if "." not in address:
        allowed = f"{', '.join(known)}, or a class as module.Name"
        raise InputError(family.where, name, allowed, nearest(name, known, "name one of these"))
    module, _, attribute = address.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        fix = f"install what it needs, or correct the name ({error})"
        raise InputError(family.where, name, "a class that can be imported", fix) from None
    if not (isinstance(found, type) and issubclass(found, family.base)):
        raise InputError(family.where, name, f"a class of {family.base.__module__}.{family.base.__name__}",
                         f"name one, or {', '.join(known)}")  # fmt: skip
    bases = {f"{base.__module__}.{base.__qualname__}".replace(".pbt.", ".") for base in found.__mro__}
    if why := next((family.refused[base] for base in bases if base in family.refused), None):
        raise InputError(family.where, name, f"another: {why}", "asha stops chains that are behind")
    return found
