"""The chains a search may try: a finite set of choices, the limits they keep, and the experiment of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from raychain.config.experiment import Baseline, Distill, Experiment, Transfer
from raychain.config.search import Search
from raychain.config.search import Space as Settings
from raychain.core.json import Json
from raychain.errors import InputError
from raychain.paradigms import make_paradigm, model_size, usable_size
from raychain.planning.macs import ModelSize, stage_macs
from raychain.planning.principles import alone_epochs, default_rules, linear_epochs
from raychain.runs.costing import proposals_for
from raychain.runs.resolve import Others, epoch_samples
from raychain.schema.durations import Duration
from raychain.searching.chains import ARROW, chains_of, check_stages, growing, models_of
from raychain.searching.experiments import part, with_stages
from raychain.searching.split import SplitBudget

Params = Json
"""Choice by dimension: plain text and numbers."""
CHAIN, FIRST, GROWN, RULE, SHARE, LR, WIDTH, DEPTH, SHRINK, ALPHA, WARMUP, LR_SCALE = (
    "chain", "first", "grown.", "rule", "share.", "lr.", "width", "depth", "shrink", "alpha", "warmup", "lr_scale",
)  # fmt: skip
"""Names of dimensions; those with a dot are followed by the name of a model."""


CHOSEN = (WIDTH, DEPTH, SHRINK, LR_SCALE)
"""Keys of `transfer` that a choice takes the place of."""


class Dimension(NamedTuple):
    """One choice that a sampler makes."""

    name: str
    choices: tuple[str | float, ...]
    ordered: bool
    """Neighbours are alike: lengths and weights, not names."""


@dataclass(frozen=True)
class Space:
    """Everything that can be tried, for one experiment."""

    experiment: Experiment
    samples: int
    """Samples of an epoch."""
    sizes: tuple[ModelSize, ...]
    """The models, smallest first."""
    chains: tuple[tuple[str, ...], ...]
    lengths: dict[str, Duration]
    """Every length by its name."""
    first: tuple[str, ...]
    """Lengths of first stages, or, where a budget is split, of models alone."""
    grown: tuple[str, ...]
    """Lengths of grown stages; empty where there are rules or a budget that is split."""
    rules: dict[str, tuple[float, float]]
    operators: dict[str, tuple[str | float, ...]]
    """Choices of the transfer, by dimension."""
    baseline: Baseline

    @property
    def chain_dimension(self) -> Dimension:
        """The choice that is made first: which models."""
        return Dimension(CHAIN, tuple(ARROW.join(chain) for chain in self.chains), ordered=False)

    def dimensions(self, chain: str) -> list[Dimension]:
        """What is left to choose for a chain of these models."""
        models, space = chain.split(ARROW), self._settings
        rates = [Dimension(LR + model, tuple(sorted(space.lr)), ordered=True) for model in models] if space.lr else []
        found = [] if space.split else [Dimension(FIRST, self.first, ordered=True)]
        if len(models) == 1:
            return found + rates
        if space.split:
            weights = tuple(sorted(set(space.split.shares)))
            found += [Dimension(SHARE + model, weights, ordered=True) for model in models]
        elif self.rules:
            found.append(Dimension(RULE, tuple(self.rules), ordered=False))
        else:
            found += [Dimension(GROWN + model, self.grown, ordered=True) for model in models[1:]]
        ordered = (SHRINK, ALPHA, WARMUP, LR_SCALE)
        found += [Dimension(name, values, name in ordered) for name, values in self.operators.items()]
        return found + rates

    @property
    def size(self) -> int:
        """How many combinations there are, those beyond the budget, and splits that come to the same, included."""
        return sum(
            math.prod(len(dimension.choices) for dimension in self.dimensions(chain))
            for chain in self.chain_dimension.choices
            if isinstance(chain, str)
        )

    def others(self, share: float) -> Others:
        """The lengths of all stages of all chains and of the controls; `share`: the proxy's part of them."""
        controls = _settings(self.experiment).controls
        first = [self.lengths[name] for name in self.first]
        if controls:
            first += [*(controls.lengths or ()), self.baseline.epochs]
        grown = [self.lengths[name] for name in self.grown]
        for rule, count in itertools.product(self.rules.values(), {len(chain) - 1 for chain in self.chains} - {0}):
            grown += [Duration(amount, "epochs") for amount in linear_epochs(0, rule, count)[1:]]
        own: Mapping[tuple[str, str], tuple[Duration, ...]] = {}
        if self.split:
            alphas = self.operators.get(ALPHA, (1.0,) if self.experiment.transfer.distill else (0.0,))
            own = self.split.lengths(self.chains, {alpha != 0 for alpha in alphas})

        def scaled(lengths: Iterable[Duration]) -> tuple[Duration, ...]:
            return tuple(part(length, share) for length in lengths)

        return Others(scaled(first), scaled(grown), {place: scaled(found) for place, found in own.items()})

    @cached_property
    def split(self) -> SplitBudget | None:
        """The budget that the stages of a chain share, where one is split."""
        own, task = self._settings.split, self.experiment.task
        if own is None:
            return None
        sizes = {size.name: size for size in self.sizes}
        items = make_paradigm(task).items(self.experiment.data)
        return SplitBudget(own.total.macs(self.baseline_macs), own.shares, sizes, items, self.samples)

    def _follows(self, params: Params) -> bool:
        """Whether grown stages have a teacher."""
        if ALPHA in params:
            return bool(params[ALPHA] != 0)
        return self.experiment.transfer.distill is not None

    def points(self) -> Iterator[Params]:
        """Every combination; splits that come to the same once."""
        for chain in self.chain_dimension.choices:
            dimensions, known = self.dimensions(str(chain)), set()
            for choices in itertools.product(*(dimension.choices for dimension in dimensions)):
                names = (dimension.name for dimension in dimensions)
                params: Params = {CHAIN: chain, **dict(zip(names, choices, strict=True))}
                rest = (value for name, value in params.items() if not name.startswith(SHARE))
                if not self.split or (same := (*rest, *self.stages(params))) not in known:
                    yield params
                    known |= {same} if self.split else set()

    def stages(self, params: Params) -> list[tuple[str, Duration]]:
        """Models and their lengths."""
        models = params[CHAIN].split(ARROW)
        if self.split:
            weights = [params[SHARE + model] for model in models] if len(models) > 1 else [1]
            return self.split.stages(models, weights, follows=self._follows(params))
        first = self.lengths[params[FIRST]]
        if len(models) == 1:
            return [(models[0], first)]
        if RULE in params:
            epochs = linear_epochs(0, self.rules[params[RULE]], len(models) - 1)[1:]
            later = [Duration(amount, "epochs") for amount in epochs]
        else:
            later = [self.lengths[params[GROWN + model]] for model in models[1:]]
        return list(zip(models, [first, *later], strict=True))

    def chosen(self, params: Params) -> Experiment:
        """The experiment with the chain and the transfer of these choices."""
        transfer = self.experiment.transfer
        distill, changes = transfer.distill, {name: params[name] for name in CHOSEN if name in params}
        if WARMUP in params:
            changes[WARMUP] = self.lengths[params[WARMUP]]
        if ALPHA in params:
            changes["distill"] = (distill or Distill()).model_copy(update={ALPHA: params[ALPHA]})
            if params[ALPHA] == 0:
                changes["distill"] = None
        made = tuple(dict.fromkeys(self.experiment.generate + self._settings.generate))
        experiment = self.experiment.model_copy(update={"generate": made}) if made else self.experiment
        found = with_stages(experiment, self.stages(params), transfer.model_copy(update=changes))
        rates = [{"lr": params[LR + s.model]} if LR + s.model in params else {} for s in found.chain]
        chain = tuple(s.model_copy(update=rate) for s, rate in zip(found.chain, rates, strict=True))
        return found.model_copy(update={"chain": chain})

    def macs(self, params: Params) -> int:
        """Training MACs of the chain."""
        follows = self._follows(params)
        sizes, total, teacher = {size.name: size for size in self.sizes}, 0, None
        for model, length in self.stages(params):
            total += self._stage_macs(sizes[model], teacher if follows else None, length)
            teacher = sizes[model]
        return total

    def affordable(self, params: Params) -> bool:
        """Within the budget, if there is one."""
        budget = self._settings.budget
        return budget is None or self.macs(params) <= budget.macs(self.baseline_macs)

    @property
    def baseline_macs(self) -> int:
        """MACs of the training that chains are compared with."""
        size = model_size(self.experiment.task, self.baseline.model, self.experiment.data.image_size)
        return self._stage_macs(size, None, self.baseline.epochs)

    def nearest(self, stages: Sequence[tuple[str, Duration]]) -> Params | None:
        """The choices nearest to a chain; None where the space has no such models."""
        chain = ARROW.join(model for model, _ in stages)
        if chain not in self.chain_dimension.choices:
            return None
        rates = {d.name: self._usual_rate(d, stages[0][0]) for d in self.dimensions(chain) if d.name.startswith(LR)}
        params: Params = {CHAIN: chain, **rates}
        if self.split is None:
            params[FIRST] = self._near(stages[0][1], self.first)
        if len(stages) == 1:
            return params
        usual = {name: self._usual(name, values) for name, values in self.operators.items()}
        if self.split:
            weights = self.split.nearest(stages, follows=self._follows(usual), samples=self._samples_seen)
            params |= {SHARE + model: weight for (model, _), weight in zip(stages, weights, strict=True)}
        elif self.rules:
            wanted = [self._steps(length) for _, length in stages[1:]]

            def distance(rule: str) -> float:
                found = self.stages(params | {RULE: rule})[1:]
                return sum(abs(math.log(self._steps(length) / w)) for (_, length), w in zip(found, wanted, strict=True))

            params[RULE] = min(self.rules, key=distance)
        else:
            params |= {GROWN + model: self._near(length, self.grown) for model, length in stages[1:]}
        return params | usual

    def _usual_rate(self, dimension: Dimension, first: str) -> float:
        scale = 1.0 if dimension.name == LR + first else self.experiment.transfer.lr_scale
        usual = self.experiment.train.lr * scale
        return min((float(rate) for rate in dimension.choices), key=lambda rate: abs(math.log(rate / usual)))

    def planned(self) -> Iterator[Params]:
        """The experiment's own chain and the planner's proposals, best first, as near as the space has them."""
        if self.experiment.chain and (own := self.nearest([(s.model, s.length) for s in self.experiment.chain])):
            yield own
        if not 2 <= len(self.sizes) <= 16 or not make_paradigm(self.experiment.task).principled:
            return
        family = self.experiment.model_copy(
            update={"family": tuple(size.name for size in self.sizes), "chain": (), "allocation": None}
        )
        for proposal in proposals_for(family)[0]:
            cost = proposal.cost
            epochs = [Duration(amount, "epochs") for amount in cost.epochs]
            if found := self.nearest(list(zip(cost.models, epochs, strict=True))):
                yield found

    def _near(self, length: Duration, names: Sequence[str]) -> str:
        wanted = max(1, self._steps(length))
        return min(names, key=lambda name: abs(math.log(max(1, self._steps(self.lengths[name])) / wanted)))

    def _usual(self, name: str, values: Sequence[str | float]) -> str | float:
        transfer = self.experiment.transfer
        if name == ALPHA:
            alpha = transfer.distill.alpha if transfer.distill else 0.0
            return min(values, key=lambda value: abs(float(value) - alpha))
        given: dict[str, str | float] = {WIDTH: transfer.width, DEPTH: transfer.depth, SHRINK: transfer.shrink,
                                         LR_SCALE: transfer.lr_scale, WARMUP: str(transfer.warmup)}  # fmt: skip
        usual = given[name]
        return usual if usual in values else values[0]

    @property
    def _settings(self) -> Settings:
        return _settings(self.experiment).space

    def _steps(self, length: Duration) -> int:
        return length.steps(epoch_samples=self.samples, global_batch=self.experiment.train.global_batch)

    def _samples_seen(self, length: Duration) -> int:
        return self._steps(length) * self.experiment.train.global_batch

    def _stage_macs(self, size: ModelSize, teacher: ModelSize | None, length: Duration) -> int:
        steps, batch, distill = (
            self._steps(length),
            self.experiment.train.global_batch,
            self.experiment.transfer.distill,
        )
        items, taught = make_paradigm(self.experiment.task).items(self.experiment.data), 0
        if distill and distill.until:
            taught = distill.until.steps(epoch_samples=self.samples, global_batch=batch, stage_steps=steps)
        return stage_macs(size, teacher, steps * batch, items, max(1, min(taught, steps)) * batch if taught else 0)


def make_space(experiment: Experiment) -> Space:
    """The space of an experiment with `search`, checked: something is left to try, and every growth works.

    Raises InputError, with the nearest alternative where limits exclude everything.
    """
    search = _settings(experiment)
    check_stages(experiment)
    matched, where = models_of(experiment, search.space)
    found = [usable_size(experiment.task, name, experiment.data.image_size, where) for name in matched]
    sizes = sorted(found, key=lambda size: size.params)
    if experiment.baseline:
        usable_size(experiment.task, experiment.baseline.model, experiment.data.image_size, "baseline.model")
    samples = epoch_samples(experiment, experiment.data)
    batch = experiment.train.global_batch

    def steps(length: Duration) -> int:
        return length.steps(epoch_samples=samples, global_batch=batch)

    own = search.space
    planned = (experiment.allocation and experiment.allocation.first) or alone_epochs(samples)
    if not (own.first or experiment.chain or make_paradigm(experiment.task).principled):
        raise InputError("search.space.first", "nothing", "lengths of first models: how long a model of "
                         f"task.paradigm {experiment.task.paradigm} trains alone is unknown", "give some")  # fmt: skip
    first = own.first or ((experiment.chain[0].length,) if experiment.chain else (Duration(planned, "epochs"),))
    grown: tuple[Duration, ...] = own.grown or ()
    if not grown and not own.rules and not own.split and experiment.chain:
        grown = tuple(stage.length for stage in experiment.chain[1:])
    rules: tuple[tuple[float, float], ...] = ()
    if not grown and not own.split:
        longest = max(steps(length) for length in first) * batch / samples
        rules = (
            own.rules
            or (experiment.allocation.rules if experiment.allocation else None)
            or tuple((_tidy(a), _tidy(b)) for a, b in default_rules(longest))
        )
    warmups = own.warmup or ()
    operators: dict[str, tuple[str | float, ...]] = {}
    named = ((WIDTH, own.width), (DEPTH, own.depth), (SHRINK, own.shrink), (ALPHA, own.alpha), (WARMUP, warmups),
             (LR_SCALE, own.lr_scale))  # fmt: skip
    for name, choices in named:
        if choices:
            operators[name] = tuple(dict.fromkeys(str(c) if isinstance(c, Duration) else c for c in choices))
    longest_first = max(first, key=steps)
    space = Space(
        experiment=experiment,
        samples=samples,
        sizes=tuple(sizes),
        chains=growing(experiment, chains_of(sizes, search, where), _transfers(experiment, operators)),
        lengths={str(length): length for length in (*first, *grown, *warmups)},
        first=tuple(dict.fromkeys(str(length) for length in sorted(first, key=steps))),
        grown=tuple(dict.fromkeys(str(length) for length in sorted(grown, key=steps))),
        rules={f"{a:g}{ARROW}{b:g}": (a, b) for a, b in rules},
        operators=operators,
        baseline=experiment.baseline or Baseline(model=sizes[-1].name, epochs=longest_first),
    )
    _check_budget(space)
    _check_split(space)
    return space


def _transfers(experiment: Experiment, operators: dict[str, tuple[str | float, ...]]) -> Iterator[Transfer]:
    """Every choice of what decides whether one model grows into another."""
    transfer = experiment.transfer
    usual = {WIDTH: transfer.width, DEPTH: transfer.depth, SHRINK: transfer.shrink}
    for choice in itertools.product(*(operators.get(name, (value,)) for name, value in usual.items())):
        yield transfer.model_copy(update=dict(zip(usual, choice, strict=True)))


def _settings(experiment: Experiment) -> Search:
    return experiment.search or Search()


def _tidy(epochs: float) -> float:
    return float(f"{epochs:.3g}")


def _check_budget(space: Space) -> None:
    """Leaves at least one affordable combination, or raises InputError with the cheapest."""
    if _settings(space.experiment).space.budget is None:
        return
    cheapest: Params | None = None
    for chain in space.chain_dimension.choices:
        dimensions = space.dimensions(str(chain))
        ends = {d.name: d.choices[:1] if d.name != RULE and d.name != ALPHA else d.choices for d in dimensions}
        for choices in itertools.product(*ends.values()):
            params = {CHAIN: chain, **dict(zip(ends, choices, strict=True))}
            if cheapest is None or space.macs(params) < space.macs(cheapest):
                cheapest = params
    assert cheapest is not None
    if space.affordable(cheapest):
        return
    stages = ARROW.join(f"{model} {length}" for model, length in space.stages(cheapest))
    percent = 100 * space.macs(cheapest) / space.baseline_macs
    raise InputError(
        "search.space.budget",
        _settings(space.experiment).space.budget,
        f"at least {percent:.1f} % of the baseline ({space.macs(cheapest):.3g} MACs)",
        f'the cheapest chain is {stages}; raise the budget to "{math.ceil(10 * percent) / 10:g} %", or allow shorter '
        f"stages",
    )


def _check_split(space: Space) -> None:
    """Leaves every stage of some chain a step where all get as much, or raises InputError with the total that does."""
    split = _settings(space.experiment).space.split
    if split is None or space.split is None:
        return
    equal = [{CHAIN: ARROW.join(chain)} | {SHARE + model: 1 for model in chain} for chain in space.chains]
    longest = max(min(length.amount for _, length in space.stages(params)) for params in equal)
    steps = longest * space.samples / space.experiment.train.global_batch
    if steps < 1:
        percent = 100 * space.split.total / steps / space.baseline_macs
        unit = 10.0 ** (math.floor(math.log10(percent)) - 1)  # upwards to two digits
        allowed = f"at least {unit * math.ceil(percent / unit):.2g} % of the baseline"
        raise InputError("search.space.split.total", split.total, allowed,
                         "raise it: no chain has a step for each of its stages")  # fmt: skip
