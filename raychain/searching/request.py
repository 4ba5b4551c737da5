"""What a search is asked for, checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

from raychain.config.experiment import Experiment
from raychain.config.search import Search
from raychain.core.storage import Folder
from raychain.data.addresses import expand
from raychain.errors import InputError, without_secrets
from raychain.evaluators.metrics import Definition, find
from raychain.runs.resolve import make_task
from raychain.searching.experiments import proxied, with_stages
from raychain.searching.space import Space, make_space
from raychain.training.task import ChainTask


@dataclass
class Plan:
    """What is known before anything starts."""

    experiment: Experiment
    search: Search
    space: Space
    metric: Definition
    """What chains are judged by."""
    base: ChainTask
    """A task of trials' data and evaluation."""
    full: ChainTask | None
    """The same without the proxy; None where there is none."""
    shards: list[str] | None
    """What the proxy reads; None: all."""
    out: Folder
    store: str


def check_folder(address: str, where: str) -> None:
    """Raises InputError for a search's folder whose address holds a key."""
    if without_secrets(address) != address:  # Tune pickles how it reaches its storage, the keys in the clear
        raise InputError(where, address, "an address without keys: Ray Tune would write them into the folder tune/",
                         "give them in the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")  # fmt: skip


def plan_search(experiment: Experiment, out: str, store: str) -> Plan:
    """Checks everything and finds the data. Raises InputError."""
    search = experiment.search or Search()
    metric = _check(experiment, search)
    space = make_space(experiment)
    shortest = [(space.chains[0][0], space.lengths[space.first[-1]])]
    whole = with_stages(experiment, shortest)
    shards = _part_of_shards(experiment, search)
    small = proxied(whole, search.proxy, shards) if search.proxy else whole
    base = make_task(small, out, store=store)
    full = make_task(whole, out, store=store) if search.proxy and search.proxy.check else None
    return Plan(experiment, search, space, metric, base, full, shards, Folder(out), store)


def judged_by(experiment: Experiment) -> Definition:
    """The metric that chains are compared by. Raises InputError where it is not measured."""
    evaluate, asked = experiment.evaluate, experiment.search.metric if experiment.search else None
    score = evaluate.judged_by
    if score is None:
        fix = "set evaluate.zero_shot, or another evaluator, or nothing can be compared"
        raise InputError("search.metric", asked or "nothing", "a metric that is measured: evaluate is empty", fix)
    try:
        return find(evaluate.definitions, asked, "search.metric") if asked else score
    except InputError as error:
        where, given, allowed, fix = error.args
        fix = fix if fix.startswith("did you") else f"--set search.metric={score.recorded}, or add it to evaluate"
        raise InputError(where, given, allowed, fix) from None


def _check(experiment: Experiment, search: Search) -> Definition:
    if search.trials < 1:
        raise InputError("search.trials", search.trials, "at least one trial", "--trials 1, or leave it out for 24")
    return judged_by(experiment)


def _part_of_shards(experiment: Experiment, search: Search) -> list[str] | None:
    if search.proxy is None or search.proxy.shards == 1:
        return None
    found = [
        address for source in experiment.data.train for address in expand(source.shards, "data.train", commands=True)
    ]
    return found[: max(1, round(search.proxy.shards * len(found)))]
