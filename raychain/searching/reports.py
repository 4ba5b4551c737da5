"""What a trial reports to Tune: its chain's measurements, in the order of the chain. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from raychain.core.json import Json
from raychain.evaluators.metrics import Definition
from raychain.records import Metrics, StageEntry
from raychain.searching.trials import Trial

Report = Json
"""Numbers and text by name: every metric, the metric that chains are judged by under its recorded name, and
`macs` (of training, from the chain's first step on), `percent` (of the baseline's), `stage` (its index), `stages`,
`model`, `epochs`, `step`, `reused` (share of the stages so far that were not trained for this trial), `key`, `whole`
(the stage is finished) and `complete` (the chain is)."""
DONE = "done"


class Measure(NamedTuple):
    """A measurement of a stage on its way."""

    step: int
    metrics: Metrics


@dataclass(frozen=True)
class Reporter:
    """Makes reports of what a campaign knows. `baseline`: MACs that are 100 percent."""

    metric: Definition
    baseline: float

    def of(
        self,
        trial: Trial,
        records: Mapping[str, StageEntry],
        curves: Mapping[str, Sequence[Measure]],
        errors: Mapping[str, str],
    ) -> tuple[list[Report], str | None]:
        """Everything that is known of the trial's chain, in order, and how the trial ended, if it has: `done`, or
        why it failed.

        What is known grows at the end alone: a stage's measurements come after those of the stage before it.
        """
        found: list[Report] = []
        spent, last, reused = 0.0, len(trial.task.stages) - 1, 0
        for place, stage in enumerate(trial.task.stages):
            record = records.get(stage.key)
            measures = [m for m in curves.get(stage.key, ()) if 0 < m.step < stage.steps]
            if record is not None:
                measures.append(Measure(stage.steps, record.metrics or {}))
                reused += stage.key not in trial.own
            for step, metrics in measures:
                whole, share = step == stage.steps, step / stage.steps
                macs = spent + share * stage.macs
                if (value := self.metric.value(metrics)) is None:
                    continue
                own: Report = {
                    self.metric.recorded: value,
                    "macs": macs,
                    "percent": 100 * macs / self.baseline,
                    "stage": place,
                    "stages": last + 1,
                    "model": stage.model,
                    "epochs": share * stage.epochs,
                    "step": step,
                    "reused": reused / (place + 1),
                    "key": stage.key,
                    "whole": whole,
                    "complete": whole and place == last,
                }
                found.append({name: value for name, value in metrics.items() if value is not None} | own)
            if record is None:
                error = next((errors[step.key] for step in trial.path if step.key in errors), None)
                return found, error
            spent += stage.macs
        if not trial.task.measured(records[trial.name]):
            return found[:-1], "its last stage was measured on other data before: give another --out or storage"
        if not (found and found[-1]["complete"]):
            return found, f"its last stage has no {self.metric.recorded}"
        return found, DONE
