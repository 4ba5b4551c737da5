"""Samplers: what is tried next. Optuna is asked and told directly.

Ray Tune's own loop runs trials as actors that know nothing of one another; here the unit of work is a stage that many
trials share, so Tune could only wait where the tree of stages schedules. Its bookkeeping is in search.json instead,
without pickles, and a study is rebuilt from there by asking for the same choices again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import optuna

from raychain.core.json import Json
from raychain.evaluators.metrics import Direction
from raychain.searching.space import CHAIN, Dimension, Params, Space

STARTUP = 8
"""Trials before TPE has something to say."""


class Sampler(Protocol):
    """Proposes choices and learns from results."""

    def ask(self, fixed: Params | None = None) -> Params | None:
        """The next choices, or `fixed` ones that are to be tried anyway; None: there are no more."""

    def tell(self, params: Params, values: tuple[float, float] | None, *, whole: bool = True) -> None:
        """The metric and MACs of asked choices, or of that part after which they were stopped; None: they cannot be
        tried."""


class Grid:
    """Every combination in turn."""

    def __init__(self, space: Space) -> None:
        self._points: Iterator[Params] = space.points()

    def ask(self, fixed: Params | None = None) -> Params | None:
        """`fixed`, else the next combination."""
        return fixed or next(self._points, None)

    def tell(self, params: Params, values: tuple[float, float] | None, *, whole: bool = True) -> None:
        """Nothing to learn."""


class Random:
    """Every choice alike; the n-th is the same in every run of a seed."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed, self._asked = space, seed, 0

    def ask(self, fixed: Params | None = None) -> Params | None:
        """`fixed`, else a random combination."""
        self._asked += 1
        if fixed:
            return fixed
        draw = random.Random(f"{self._seed}/{self._asked}")
        params: Params = {CHAIN: draw.choice(self._space.chain_dimension.choices)}
        for dimension in self._space.dimensions(params[CHAIN]):
            params[dimension.name] = draw.choice(dimension.choices)
        return params

    def tell(self, params: Params, values: tuple[float, float] | None, *, whole: bool = True) -> None:
        """Nothing to learn."""


class Tpe:
    """Optuna's TPE: on the metric alone, or on the front of metric and MACs. Running trials count as poor ones, so that
    concurrent ones differ."""

    def __init__(self, space: Space, seed: int, *, pareto: bool, best: Direction) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._pareto = space, pareto
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, constant_liar=True)
        better: Literal["maximize", "minimize"] = "maximize" if best == "high" else "minimize"
        directions: list[Literal["maximize", "minimize"]] = [better, "minimize"] if pareto else [better]
        self._study = optuna.create_study(directions=directions, sampler=sampler)
        self._open: list[tuple[Params, optuna.Trial]] = []

    def ask(self, fixed: Params | None = None) -> Params | None:
        """`fixed`, else what TPE takes for best."""
        if fixed:
            self._study.enqueue_trial(self._inner(fixed))
        trial = self._study.ask()
        params: Params = {CHAIN: self._choose(trial, self._space.chain_dimension)}
        for dimension in self._space.dimensions(params[CHAIN]):
            params[dimension.name] = self._choose(trial, dimension)
        self._open.append((params, trial))
        return params

    def tell(self, params: Params, values: tuple[float, float] | None, *, whole: bool = True) -> None:
        """The results of choices that were asked for."""
        index = next(i for i, (known, _) in enumerate(self._open) if known == params)
        _, trial = self._open.pop(index)
        if values is None:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif not whole:
            trial.report(values[0], step=round(values[1]))
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(trial, list(values) if self._pareto else values[0])

    def _inner(self, params: Params) -> Json:
        dimensions = [self._space.chain_dimension, *self._space.dimensions(params[CHAIN])]
        return {d.name: d.choices.index(params[d.name]) if d.ordered else params[d.name] for d in dimensions}

    def _choose(self, trial: optuna.Trial, dimension: Dimension) -> Any:
        if dimension.ordered:
            return dimension.choices[trial.suggest_int(dimension.name, 0, len(dimension.choices) - 1)]
        return trial.suggest_categorical(dimension.name, list(dimension.choices))


def make_sampler(space: Space, kind: str, seed: int, *, pareto: bool, best: Direction = "high") -> Sampler:
    """The sampler of the experiment's `search.sampler`; `best` is the metric's better direction."""
    if kind == "tpe":
        return Tpe(space, seed, pareto=pareto, best=best)
    return Grid(space) if kind == "grid" else Random(space, seed)
