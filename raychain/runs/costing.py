"""From an experiment to what it costs: counts its models and data, and lets the planner choose a family's chain."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from raychain.config.experiment import Allocation, Data, Experiment, Stage
from raychain.errors import InputError
from raychain.models import UnknownModelError, family_of, matching_models
from raychain.paradigms import make_paradigm, usable_size
from raychain.planning.checks import warnings
from raychain.planning.cost import ChainCost, Setting, StageCost
from raychain.planning.macs import ModelSize
from raychain.planning.proposals import Limits, Proposal, propose
from raychain.runs.generated import Pair, apart, generated
from raychain.runs.resolve import epoch_samples
from raychain.schema.durations import Duration


class Costed(NamedTuple):
    """A chain's cost and what is doubtful about the chain."""

    cost: ChainCost
    samples: int
    """Samples of the first stage's epoch."""
    warnings: list[str]


def cost_of(experiment: Experiment) -> Costed:
    """What the experiment's chain costs, stage by stage, with each stage's own data. Raises InputError."""
    follows = experiment.transfer.distill is not None
    settings = []
    for place in range(len(experiment.chain)):
        index = max(place, experiment.first_trained)  # what is given reads nothing
        own = "train" in experiment.chain[index].data.model_fields_set
        where = f"chain.{index}.data.train" if own else "data.train"
        settings.append(_setting(experiment, experiment.stage_data(index), where))
    stages: list[StageCost] = []
    for index, (stage, setting) in enumerate(zip(experiment.chain, settings, strict=True)):
        pixels = experiment.stage_data(index).image_size
        size = usable_size(experiment.task, stage.model, pixels, f"chain.{index}.model")
        if stage.checkpoint is not None:
            stages.append(StageCost(size, 0.0, 0, setting.items, None, stage.checkpoint))
            continue
        before, start = experiment.chain[index - 1].model if index else "", None
        if stage.start:
            before = stage.start.model
            start = usable_size(experiment.task, before, pixels, f"chain.{index}.start.model")
        teacher = usable_size(experiment.task, before, pixels, "data.image_size") if before and follows else None
        epochs, seen = _length(stage.length, setting, f"chain.{index}.epochs")
        origin = stage.start.checkpoint if stage.start else None
        stages.append(StageCost(size, epochs, seen, setting.items, teacher, origin, start, setting.taught(seen)))
    given = experiment.baseline
    pixels, items = experiment.stage_data(len(stages) - 1).image_size, settings[-1].items
    last = usable_size(experiment.task, given.model, pixels, "baseline.model") if given else stages[-1].size
    first = stages[experiment.first_trained]
    epochs, seen = first.epochs, first.samples
    if given:
        epochs, seen = _length(given.epochs, settings[0], "baseline.epochs")
    baseline = StageCost(last, epochs, seen, items, None)
    alone = sum(StageCost(stage.size, epochs, seen, stage.items, None).macs for stage in stages if not stage.given)
    cost = ChainCost(tuple(stages), baseline, alone)
    known = _known(experiment)
    samples = settings[0].samples
    found = warnings(cost, samples, known) if make_paradigm(experiment.task).principled else []
    if given is None and stages[0].origin is not None:
        found.append(f"the chain begins with a checkpoint, and is compared with {last.name} alone for the epochs of "
                     f"{first.size.name}: name in `baseline` what you would train instead")  # fmt: skip
    return Costed(cost, samples, found)


def proposals_for(experiment: Experiment) -> tuple[list[Proposal], int]:
    """The planner's chains for the experiment's family, best first, and the samples of an epoch. Raises InputError."""
    try:
        names = matching_models(experiment.family or (), make_paradigm(experiment.task).known())
    except UnknownModelError as error:
        raise InputError("family", ", ".join(experiment.family or ()), str(error), "correct the pattern") from None
    except ValueError as error:
        raise InputError("family", ", ".join(experiment.family or ()), str(error), "close the brace") from None
    pixels, given = experiment.data.image_size, experiment.baseline
    family = [usable_size(experiment.task, name, pixels, "family") for name in names]
    setting = _setting(experiment, experiment.data, "data.train")
    baseline = None
    if given:
        baseline = (
            usable_size(experiment.task, given.model, pixels, "baseline.model"),
            _length(given.epochs, setting, "baseline.epochs")[0],
        )
    wanted = experiment.allocation or Allocation()
    limits = Limits(wanted.first, wanted.rules, wanted.ratios, wanted.budget, wanted.all_models)
    principled = make_paradigm(experiment.task).principled
    if not principled and not (limits.first and limits.rules):
        raise InputError("family", ", ".join(experiment.family or ()), f"with task.paradigm {experiment.task.paradigm} "
                         "also allocation.first and allocation.rules, the epochs of the first and of grown models: how "
                         "long chains of it should train is not known", "give them, or write a chain")  # fmt: skip
    found = propose(family, setting, limits, baseline, _apart(experiment, family), principled=principled)
    return found, setting.samples


def with_chain(experiment: Experiment, proposal: Proposal | None = None) -> Experiment:
    """The experiment with `proposal`'s chain (absent: the planner's first) in place of its family; itself if it has a
    chain. Raises InputError.
    """
    if experiment.chain:
        return experiment
    chosen = (proposal or proposals_for(experiment)[0][0]).cost
    chain = tuple(
        Stage(model=model, epochs=Duration(epochs, "epochs"))
        for model, epochs in zip(chosen.models, chosen.epochs, strict=True)
    )
    return experiment.model_copy(update={"chain": chain, "family": None, "allocation": None})


def _apart(experiment: Experiment, family: Sequence[ModelSize]) -> dict[Pair, InputError]:
    """Pairs of models, one of them generated, that do not grow into one another."""
    made = generated(experiment)
    names = [size.name for size in sorted(family, key=lambda size: size.params)]
    pairs = [pair for pair in itertools.combinations(names, 2) if made.intersection(pair)]
    return apart(experiment, pairs, [experiment.transfer], made)


def _setting(experiment: Experiment, data: Data, where: str) -> Setting:
    try:
        samples = epoch_samples(experiment, data, where)
    except InputError as error:
        at, given, allowed, fix, *_ = error.args
        hint = "; or say how many samples there are, to plan without them: --set data.samples=N" if at == where else ""
        raise InputError(at, given, allowed, fix + hint) from None
    items = make_paradigm(experiment.task).items(data)
    distilled = experiment.transfer.distill
    until = distilled.until if distilled else None
    return Setting(samples, items, experiment.train.global_batch, distilled is not None, until)


def _length(duration: Duration, setting: Setting, where: str) -> tuple[float, int]:
    """Epochs and samples seen, in whole steps as a run takes them."""
    steps = duration.steps(epoch_samples=setting.samples, global_batch=setting.global_batch)
    if steps < 1:
        raise InputError(where, duration, "at least one optimiser step", "lengthen it or lower global_batch")
    seen = steps * setting.global_batch
    exact = duration.amount if duration.unit == "epochs" else round(seen / setting.samples, 4)
    return exact, seen


def _known(experiment: Experiment) -> list[ModelSize]:
    """The family of the chain's first model, where it is one of raychain's: what a warning can recommend."""
    names = family_of(experiment.chain[0].model)
    return [usable_size(experiment.task, name, experiment.data.image_size, "chain") for name in names]
