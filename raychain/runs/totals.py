"""What a chain costs in all, against the baseline."""

from __future__ import annotations

from raychain.config.experiment import Baseline
from raychain.paradigms import make_paradigm, model_size
from raychain.planning.macs import stage_macs
from raychain.records import TotalsRecord
from raychain.training.task import ChainTask


def totals(task: ChainTask, wall_s: float) -> TotalsRecord:
    """`totals` of run.json: the chain's MACs against the baseline's."""
    experiment = task.experiment
    first, last = task.stages[experiment.first_trained], task.stages[-1]
    lengths = {"epoch_samples": first.epoch_samples, "global_batch": experiment.train.global_batch}
    baseline = experiment.baseline or Baseline(model=last.model, epochs=experiment.chain[first.index].length)
    samples = baseline.epochs.steps(**lengths) * experiment.train.global_batch
    items = make_paradigm(experiment.task).items(experiment.stage_data(last.index))
    alone = stage_macs(model_size(experiment.task, baseline.model, last.size), None, samples, items)
    macs = sum(stage.macs for stage in task.stages)
    return TotalsRecord(
        macs=macs,
        baseline_macs=alone,
        percent_of_baseline=round(100 * macs / alone, 2),
        speedup=round(alone / macs, 3),
        wall_s=round(wall_s, 3),
    )
