"""The Tuner of a search: restored from its folder, or made anew, with what search.json remembers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

from pyarrow import fs
from ray import tune
from ray.tune import Callback, ResultGrid
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback, TBXLoggerCallback
from ray.tune.search import Searcher

import raychain
from raychain.config.search import named
from raychain.core.json import Json
from raychain.core.storage import Folder
from raychain.records import SearchRecord
from raychain.searching.book import Book
from raychain.searching.choices import Choices
from raychain.searching.judging import Rungs
from raychain.searching.request import Plan
from raychain.searching.space import Params
from raychain.searching.trials import CHOSEN
from raychain.searching.tune.desk import Desk
from raychain.searching.tune.link import Link
from raychain.searching.tune.live import DamagedStateError, live
from raychain.searching.tune.named import CALLBACKS, STOPPERS, make
from raychain.searching.tune.scheduler import ChainScheduler, HalvingScheduler, make_scheduler
from raychain.searching.tune.searcher import ChainGenerator, ChainSearch
from raychain.searching.tune.searchers import make_searcher
from raychain.searching.tune.stopper import ChainStopper

NAME = "tune"
"""The experiment's folder, in that of the search."""
STATE = "tuner.pkl"
RETRIES = 2
"""How often a trial whose process was killed is begun again."""
WAITING = 8
"""Trials that may wait beside one for each worker group, so that chains which share a running stage leave none idle."""
LEAST_WAITING = 2
PROCESSES = 24
"""Beyond so many trials only LEAST_WAITING wait: each is a process of 0.12 GiB on the driver's node, 2.8 GiB in all."""


def settings(groups: int) -> dict[str, str]:
    """What Tune takes from environment variables alone: how many trials wait, and no output of its own."""
    return {
        "TUNE_MAX_PENDING_TRIALS_PG": str(most_open(groups)),
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of trials that are let go
    }


def versions() -> dict[str, str]:
    """The programs whose objects are in the folder `tune`; others might not understand them."""
    return {"ray": version("ray"), "raychain": raychain.__version__}


def most_open(groups: int) -> int:
    """Trials that are not over at once."""
    return max(groups + LEAST_WAITING, min(groups + WAITING, PROCESSES))


def can_restore(out: Folder, before: SearchRecord | None) -> bool:
    """Whether the folder has an experiment of Tune's that these versions wrote."""
    return before is not None and before.tune == versions() and out.exists(f"{NAME}/{STATE}")


def put_aside(out: Folder) -> None:
    """Makes room for another experiment."""
    if out.exists(NAME):
        number = sum(name.startswith(f"{NAME}.before-") for name in out.list())
        out.move(NAME, f"{NAME}.before-{number + 1}")


@dataclass
class Parts:
    """What an experiment names of Tune's, made; each is used in one search alone."""

    searcher: Searcher
    left: list[Params]
    """Chains to begin with that the searcher cannot be told."""
    scheduler: ChainScheduler
    stopper: ChainStopper
    callbacks: list[Callback]


def make_parts(plan: Plan, rungs: Rungs | None, points: Sequence[Params] = ()) -> Parts:
    """Raises InputError for what cannot be."""
    search, metric = plan.search, plan.metric.recorded
    mode = "max" if plan.metric.best == "high" else "min"
    aims: Json = {"metric": metric, "mode": mode}
    if search.aim == "pareto":
        aims = {"metric": [metric, "macs"], "mode": [mode, "min"]}
    choices = Choices.of_space(plan.space)
    searcher, left = make_searcher(search.sampler, choices, aims, seed=search.seed, points=points)
    return Parts(
        searcher,
        left,
        make_scheduler(search.scheduler, rungs, metric, mode),
        ChainStopper([make(STOPPERS, named(part), metric=metric, mode=mode) for part in search.stop]),
        [make(CALLBACKS, named(part)) for part in search.callbacks],
    )


def fit(
    book: Book, desk: Desk, groups: int, *, rungs: Rungs | None, seeds: Sequence[Params], restore: bool
) -> ResultGrid:
    """Tune's loop, until the search is over or a signal ends it.

    Raises DamagedStateError, before anything was begun, where the folder cannot be restored.
    """
    plan, before = book.plan, book.before
    earlier = [] if restore or before is None else [t.params for t in before.trials or () if t.kind in CHOSEN]
    parts = make_parts(plan, rungs, [*earlier, *(seed for seed in seeds if seed not in earlier)])
    if isinstance(parts.scheduler, HalvingScheduler) and before and before.asha and not restore:
        parts.scheduler.restore_rungs(before.asha)
    search = ChainSearch(parts.searcher, book, desk, rungs=rungs, most_open=most_open(groups), seeds=seeds)
    search.first += parts.left
    generator = ChainGenerator(search, restored=restore)
    loggers = [JsonLoggerCallback(), CSVLoggerCallback(), TBXLoggerCallback()]
    link = Link(book, desk, parts.scheduler, [*loggers, *parts.callbacks])
    with live(plan.out.address, generator, parts.scheduler, parts.stopper, link):
        if not restore:
            return _new(plan, desk, generator, parts, link).fit()
        tuner, link.expected = _restored(plan.out, desk)
        return tuner.fit()


def _new(plan: Plan, desk: Desk, generator: ChainGenerator, parts: Parts, link: Link) -> tune.Tuner:
    aim: dict[str, Any] = {"metric": plan.metric.recorded, "mode": "max" if plan.metric.best == "high" else "min"}
    config = tune.TuneConfig(search_alg=generator, scheduler=parts.scheduler, num_samples=-1, reuse_actors=True,
                             trial_dirname_creator=folder_name,
                             **(aim if plan.search.aim == "metric" else {}))  # fmt: skip
    run = tune.RunConfig(name=NAME, storage_path=plan.out.path, storage_filesystem=_filesystem(plan.out), verbose=0,
                         callbacks=[link], stop=parts.stopper,
                         failure_config=tune.FailureConfig(max_failures=RETRIES))  # fmt: skip
    return tune.Tuner(desk.trainable, tune_config=config, run_config=run)


def _restored(out: Folder, desk: Desk) -> tuple[tune.Tuner, int]:
    """The Tuner of an earlier call, and how many trials it knows."""
    path = str(PurePosixPath(out.path) / NAME)
    try:
        tuner = tune.Tuner.restore(path, desk.trainable, storage_filesystem=_filesystem(out), resume_errored=True)
        return tuner, len(tuner.get_results())
    except Exception as error:  # whatever is wrong with files and pickles
        raise DamagedStateError(f"{type(error).__name__}: {error}") from error


def _filesystem(out: Folder) -> fs.FileSystem | None:
    return None if out.local else out.fs


def folder_name(trial: TuneTrial) -> str:
    """The name of a trial's folder within the experiment's."""
    return f"{trial.config['number']:04d}-{trial.trial_id}"
