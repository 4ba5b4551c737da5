"""The training that a chain is compared with, as an experiment of its own."""

from __future__ import annotations

from raychain.config.experiment import Experiment, Stage


def alone(experiment: Experiment) -> Experiment:
    """The experiment whose chain is the baseline: the last model, or the one that `baseline` names, without a chain.

    It trains for the baseline's length on what the last stage reads. `experiment` has a chain.
    """
    last, given = experiment.chain[-1], experiment.baseline
    length = given.epochs if given else experiment.chain[experiment.first_trained].length
    stage = Stage(model=given.model if given else last.model, epochs=length, data=last.data, workers=last.workers)
    return experiment.model_copy(update={"chain": (stage,), "baseline": None, "name": f"{experiment.name}-alone"})
