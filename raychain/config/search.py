"""What `raychain search` may vary and how it looks for the best chain, as a user writes it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeFloat, PositiveInt, model_validator

from raychain.core.json import Json
from raychain.schema.allocation import Budget, EpochRule, MacsBudget, RatioBounds
from raychain.schema.component import Component, OneOrMore, Seed
from raychain.schema.durations import Epochs, Warmup
from raychain.schema.generate import Generates

MOST_CHOICES = 1000
"""Values that one range may have."""


def _choices(value: Any) -> Any:
    """`{low: 2, high: 8, step: 2}` as the list of its values; one value as a list."""
    if not isinstance(value, dict):
        return value if isinstance(value, list | tuple) else [value]
    numbers: list[Any] = [value.get(key) for key in ("low", "high", "step")]
    if value.keys() != {"low", "high", "step"} or not all(isinstance(n, int | float) for n in numbers):
        raise ValueError("allowed is a list of choices, or a range {low: 2, high: 8, step: 2}")
    low, high, step = numbers
    if not (step > 0 and low <= high and (high - low) / step < MOST_CHOICES):
        raise ValueError(f"allowed is a range with low <= high and a step above zero, of at most {MOST_CHOICES} values")
    return [round(low + i * step, 9) for i in range(int((high - low) / step + 1e-9) + 1)]


Lengths = Annotated[tuple[Epochs, ...], BeforeValidator(_choices), Field(min_length=1)]
"""Choices, each "N epochs" (the unit of bare numbers), "N steps" or "N samples"; or {low, high, step} in epochs."""
Amounts = Annotated[tuple[NonNegativeFloat, ...], BeforeValidator(_choices), Field(min_length=1)]
Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_choices), Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Warmups = Annotated[tuple[Warmup, ...], BeforeValidator(_choices), Field(min_length=1)]


class Split(Component):
    """Training MACs that are the same for every chain, of which each stage gets a part."""

    total: MacsBudget
    """MACs of a chain: "30 %" of the baseline, "9.5 EMACs", or a number."""
    shares: Annotated[
        tuple[Annotated[int, Field(ge=1, le=100)], ...], BeforeValidator(_choices), Field(min_length=1, max_length=12)
    ]
    """Weights, each stage's chosen on its own: a stage gets its weight's part of the sum of all. Its length follows."""


class Space(Component):
    """The chains that are tried: every combination of these choices within the limits."""

    models: OneOrMore | None = None
    """Names, with braces and globs. Every chain ends with the largest. Absent: the experiment's family, or the models
    of its chain."""
    generate: Generates = ()
    """Models between known ones, by expansion ratio; one, or a list. They are tried beside `models`, or, without
    these, in their place, with the two that they are between."""
    lengths: Annotated[tuple[PositiveInt, ...], BeforeValidator(_choices), Field(min_length=1)] | None = None
    """Numbers of models a chain may have. Absent: all from two on."""
    ratios: RatioBounds | None = None
    """Bounds of every expansion ratio (parameters of the image tower). Absent: none."""
    budget: MacsBudget | None = None
    """Upper bound of a chain's training MACs: "30 %" of the baseline, "9.5 EMACs", or a number."""
    first: Lengths | None = None
    """Length of the first stage. Absent: that of the experiment's chain, else the planner's."""
    grown: Lengths | None = None
    """Length of every other stage, each chosen on its own."""
    rules: Annotated[tuple[EpochRule, ...], Field(min_length=1)] | None = None
    """Instead of `grown`: [epochs of the second model, epochs of the last], linear in between. Absent, and without
    `grown`: the planner's."""
    split: Split | None = None
    """Instead of `first`, `grown` or `rules`, and `budget`: every chain costs the same, and how the stages share it is
    searched: {total: "30 %", shares: [1, 2, 3, 4]}."""
    lr: Rates | None = None
    """Peak learning rates, each stage's chosen on its own. Absent: `train.lr`, times `lr_scale` for grown stages."""
    width: OneOrMore | None = None
    """Growth operators for widths. Absent, as for the keys below: that of `transfer`."""
    depth: OneOrMore | None = None
    """Growth operators for layers."""
    shrink: Annotated[tuple[Share, ...], BeforeValidator(_choices), Field(min_length=1)] | None = None
    """Shares of the grown weights; the rest is random."""
    alpha: Amounts | None = None
    """Weights of the distillation; 0: none."""
    warmup: Warmups | None = None
    """Warm-ups of grown stages."""
    lr_scale: Rates | None = None
    """Peak learning rates of grown stages as multiples of `train.lr`."""

    @model_validator(mode="after")
    def _one_of(self) -> Space:
        if self.grown and self.rules:
            raise ValueError("allowed is either `grown` or `rules`: both are the lengths of the grown stages")
        if self.split and (beside := [n for n in ("first", "grown", "rules", "budget") if getattr(self, n)]):
            names = " and ".join(f"`{name}`" for name in beside)
            raise ValueError(f"allowed is `split` without {names}: it decides every stage's length and the total MACs")
        if self.lr and self.lr_scale:
            raise ValueError("allowed is either `lr` or `lr_scale`: both are the learning rates of grown stages")
        return self


class Proxy(Component):
    """Cheaper trials that stand for the full ones. `best.yaml` is the full experiment again."""

    shards: float = Field(1.0, gt=0, le=1)
    """Share of the training shards that is read (at least one); an epoch becomes as much shorter."""
    epochs: float = Field(1.0, gt=0, le=1)
    """Share of every stage's length."""
    image_size: int | None = Field(None, ge=8, le=8192)
    """Pixels a side."""
    check: int = Field(3, ge=0)
    """Trials, from the best to the worst, that are trained in full too, to say whether the proxy ranks them alike."""


class Asha(Component):
    """Asynchronous successive halving: ends chains that are behind others at equal training MACs."""

    grace: MacsBudget = Budget(10.0, "%")
    """Training MACs that every chain has, from its first stage's first step: "10 %" of the baseline, or as `budget`."""
    reduction_factor: float = Field(3.0, gt=1)
    """From `grace`, and from each so many times as many MACs, about one chain of so many goes on."""


class Controls(Component):
    """Models trained alone, without which a good chain proves little. They come on top of `trials`."""

    lengths: Lengths | None = None
    """Lengths of each model alone. Absent: those of the first stage."""
    equal_macs: bool = True
    """At the end each model alone at the best chain's MACs."""


class Named(BaseModel):
    """A part by its name, with its options beside: `{name: hyperopt, n_initial_points: 5}`."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

    @property
    def options(self) -> Json:
        """What stands beside the name."""
        return dict(self.model_extra or {})

    @property
    def written(self) -> str:
        """The search as a user would write it."""
        return f"{{{', '.join(f'{key}: {value}' for key, value in self.model_dump().items())}}}"


Part = str | Named
Parts = Annotated[tuple[Part, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str | dict) else v)]


def named(part: Part) -> Named:
    """The part with its options, of which a name alone has none."""
    return Named(name=part) if isinstance(part, str) else part


class Search(Component):
    """How `raychain search` looks for a chain that is better than the planner's."""

    space: Space = Space()
    sampler: Part = "tpe"
    """`tpe` (Optuna's tree-structured Parzen estimator), `random`, `grid` (every combination in turn), another sampler
    of Optuna's such as `GPSampler`, a searcher of Ray Tune's (`hyperopt`, `ax`, `bohb`, …), or a Searcher of one's own
    as `module.Class`; with options `{name: …, option: …}`."""
    aim: Literal["metric", "pareto"] = "metric"
    """What TPE, or another sampler of Optuna's, looks for: the highest metric, or the front of metric and MACs."""
    metric: str | None = None
    """What chains are compared by: a metric of the last stage, such as `imagenet/top1`. Absent: `evaluate.score`."""
    trials: int = 24
    """Chains that are tried, the seeds included."""
    concurrent: PositiveInt | None = None
    """Worker groups at once. Absent: as many as the cluster holds."""
    seeds: int = Field(3, ge=0)
    """The planner's proposals, as near as the space has them, that are tried first."""
    seed: Seed = 0
    """Seed of the sampler."""
    controls: Controls | None = Controls()
    """null: none."""
    proxy: Proxy | None = None
    asha: Asha | None = None
    """null: every chain is trained to its end, unless `scheduler` stops it."""
    scheduler: Part | None = None
    """Instead of `asha`: a scheduler of Ray Tune's (`median`, `hyperband`, `bohb`) or one's own as `module.Class`. Its
    time is `percent`: training MACs from the chain's first step on, in percent of the baseline's."""
    stop: Parts = ()
    """Stoppers of Ray Tune's: `{name: timeout, timeout: 3600}` (seconds, of a call), `trial_plateau`,
    `experiment_plateau`, `maximum_iterations`, or one's own as `module.Class`. Controls are not stopped by what
    stops single trials."""
    callbacks: Parts = ()
    """Callbacks of Ray Tune's: `wandb`, `mlflow`, `comet`, `aim`, or one's own as `module.Class`."""

    @model_validator(mode="before")
    @classmethod
    def _asha_by_name(cls, given: Any) -> Any:
        """`scheduler: asha`, with options or without, is what `asha` is."""
        scheduler = given.get("scheduler") if isinstance(given, dict) else None
        name = scheduler.get("name") if isinstance(scheduler, dict) else scheduler
        if name != "asha":
            return given
        if given.get("asha"):
            raise ValueError("allowed is either `asha` or `scheduler: asha`")
        options = {k: v for k, v in scheduler.items() if k != "name"} if isinstance(scheduler, dict) else {}
        return {k: v for k, v in given.items() if k != "scheduler"} | {"asha": options}

    @model_validator(mode="after")
    def _halved_by_metric(self) -> Search:
        if (self.asha or self.scheduler) and self.aim == "pareto":
            raise ValueError("allowed is `asha` with `aim: metric`: a chain on the front may be behind at equal MACs")
        if self.asha and self.scheduler:
            raise ValueError("allowed is either `asha` or `scheduler`")
        return self
