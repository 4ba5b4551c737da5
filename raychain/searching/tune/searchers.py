"""The searchers that an experiment can name, for the space of a search."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import optuna
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Domain

from raychain.config.search import Named, Part, named
from raychain.core.json import Json
from raychain.errors import InputError, nearest
from raychain.searching.choices import Choices
from raychain.searching.space import CHAIN, Params
from raychain.searching.tune.named import SEARCHERS, Family, make

WALKS = ("random", "grid")
SEEDS = ("seed", "random_state_seed", "random_seed")
"""What searchers call the seed."""
STARTUP = 8
"""Trials before TPE has something to say."""


class Suggesting(Protocol):
    """The part of an Optuna trial that the space needs."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of these."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A number from `low` to `high`."""


class Define:
    """The space for Optuna: only what the chosen chain has. A class, as Optuna's searcher is pickled with it."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices

    def __call__(self, trial: Suggesting) -> None:
        chain = trial.suggest_categorical(CHAIN, list(self.choices.chains))
        for name, choices, ordered in self.choices.of[chain]:
            if ordered:
                trial.suggest_int(name, 0, len(choices) - 1)
            else:
                trial.suggest_categorical(name, list(choices))


class Walk(Searcher):
    """Every combination in turn, or random ones, of which the n-th is the same in every run of a seed.

    Tune's own variant generator is no Searcher: it cannot be asked again where a suggestion is no new chain.
    """

    def __init__(self, choices: Choices, metric: str, mode: str, *, seed: int | None, points: Sequence[Params]) -> None:
        super().__init__(metric, mode)
        self._choices, self._seed, self._points, self._asked = choices, seed, list(points), 0
        self._walk: Iterator[Params] | None = None

    def suggest(self, trial_id: str) -> Any:  # noqa: ARG002
        """The next combination."""
        self._asked += 1
        if self._asked <= len(self._points):
            return self._choices.encode(self._points[self._asked - 1])
        if self._seed is not None:
            return self._choices.encode(self._choices.drawn(random.Random(f"{self._seed}/{self._asked}")))
        if self._walk is None:
            self._walk = self._choices.points()
            for _ in range(self._asked - len(self._points) - 1):
                next(self._walk, None)
        params = next(self._walk, None)
        return Searcher.FINISHED if params is None else self._choices.encode(params)

    def on_trial_complete(self, trial_id: str, result: Json | None = None, error: bool = False) -> None:
        """Nothing to learn."""

    def save(self, checkpoint_path: str) -> None:
        """How far it is."""
        Path(checkpoint_path).write_text(str(self._asked))

    def restore(self, checkpoint_path: str) -> None:
        """Goes on from there."""
        self._asked, self._walk = int(Path(checkpoint_path).read_text()), None


def make_searcher(
    part: Part, choices: Choices, aims: Json, *, seed: int, points: Sequence[Params]
) -> tuple[Searcher, list[Params]]:
    """The searcher of the experiment's `search.sampler`, and those of the points that it cannot take itself.

    `aims` has `metric` and `mode`. Raises InputError.
    """
    wanted = named(part)
    if wanted.name in WALKS:
        if wanted.options:
            raise InputError("search.sampler", wanted.written, f"`{wanted.name}` has no options", "leave them out")
        return Walk(choices, **aims, seed=seed if wanted.name == "random" else None, points=points), []
    if wanted.name in ("tpe", "optuna") or wanted.name.endswith("Sampler"):
        sampler = _optuna_sampler(wanted, seed)
        first = [choices.encode(params) for params in points]
        return OptunaSearch(Define(choices), **aims, sampler=sampler, points_to_evaluate=first), []
    if isinstance(aims["metric"], list):
        raise InputError("search.sampler", wanted.name, "tpe or another sampler of Optuna's with `aim: pareto`",
                         "search.sampler=tpe, or search.aim=metric")  # fmt: skip
    return _tunes(wanted, choices, aims, seed, points)


def _optuna_sampler(wanted: Named, seed: int) -> optuna.samplers.BaseSampler:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if wanted.name in ("tpe", "optuna"):
        wanted = Named(name="TPESampler", **({"n_startup_trials": STARTUP, "constant_liar": True} | wanted.options))
    kinds = _samplers()
    if wanted.name not in kinds:
        raise InputError(
            "search.sampler", wanted.name, ", ".join(kinds), nearest(wanted.name, kinds, "name one of these")
        )
    family = Family("search.sampler", optuna.samplers.BaseSampler, {wanted.name: f"optuna.samplers.{wanted.name}"})
    found: optuna.samplers.BaseSampler = make(family, wanted, seed=seed)
    return found


def _samplers() -> list[str]:
    return [name for name in dir(optuna.samplers) if name.endswith("Sampler") and name != "BaseSampler"]


def _tunes(
    wanted: Named, choices: Choices, aims: Json, seed: int, points: Sequence[Params]
) -> tuple[Searcher, list[Params]]:
    first = [choices.encode(params, whole=True) for params in points]
    others = dict.fromkeys(("tpe", *WALKS, *_samplers()), "")
    usual = {"points_to_evaluate": first or None} | dict.fromkeys(SEEDS, seed) | aims
    searcher: Searcher = make(SEARCHERS, wanted, others, **usual)
    try:
        searcher.set_search_properties(aims["metric"], aims["mode"], flat(choices))
    except Exception as error:  # whatever it says of a space that it does not take
        fix = f"name another ({type(error).__name__}: {error})"
        raise InputError("search.sampler", wanted.written, "a searcher of whole numbers and choices", fix) from None
    takes = "points_to_evaluate" in inspect.signature(type(searcher)).parameters
    return searcher, [] if takes else list(points)


def flat(choices: Choices) -> dict[str, Domain]:
    """Every dimension of any chain, those that a chain does not have included: whole numbers for ordered choices."""
    found: dict[str, Domain] = {CHAIN: tune.choice(list(choices.chains))}
    for name, values, ordered in choices.every.values():
        found[name] = tune.randint(0, len(values)) if ordered else tune.choice(list(values))
    return found
