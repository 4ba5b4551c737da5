"""What workers are told of a trial's choices."""

from __future__ import annotations

from raychain.config.experiment import Experiment
from raychain.core.storage import below
from raychain.errors import InputError
from raychain.runs.resolve import replan
from raychain.schema.durations import Duration
from raychain.searching.experiments import proxied, with_stages
from raychain.searching.request import Plan
from raychain.searching.space import CHAIN, Params
from raychain.searching.trials import Kind
from raychain.training.task import ChainTask

UNKNOWN = (KeyError, TypeError, ValueError, IndexError, AttributeError)
"""What the space and the samplers raise for choices that are not theirs."""


class Tasks:
    """The tasks of a search's trials."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.space = plan, plan.space

    def task(self, kind: Kind, params: Params) -> ChainTask | None:
        """What the workers are told; None where a stage would be too short for a step or its warm-up."""
        experiment = self.experiment(params)
        proxy, base = self.plan.search.proxy, self.plan.base
        if proxy and kind == "full":
            assert self.plan.full is not None
            base = self.plan.full
        elif proxy:
            experiment = proxied(experiment, proxy, self.plan.shards)
        try:
            others = self.space.others(proxy.epochs if proxy and kind != "full" else 1.0)
            task = replan(base, experiment, self.plan.out.address, others)
            # the folder of the chain: what is left of an interrupted stage is there
            folder = below(self.plan.out.address, f"chains/{task.stages[-1].key[:12]}")
            return replan(base, experiment, folder, others)
        except InputError:
            return None

    def experiment(self, params: Params) -> Experiment:
        if "length" in params:
            length = self.space.lengths.get(params["length"]) or _length(params["length"])
            return with_stages(self.space.experiment, [(params[CHAIN], length)])
        return self.space.chosen(params)

    def possible(self, kind: Kind, params: Params) -> ChainTask | None:
        """The task of choices that anybody may have written; None where they make none."""
        try:
            return self.task(kind, params)
        except UNKNOWN:
            return None


def _length(text: str) -> Duration:
    amount, unit = text.split(" ")
    return Duration(float(amount), unit)
