"""`raychain.run`: trains the chain of an experiment; the same command again continues it."""

from __future__ import annotations

import json

from raychain.config import Experiment, opened
from raychain.core.json import Json
from raychain.errors import RunFailed
from raychain.terminal import say


def run(
    experiment: str | Experiment = "demo",
    *,
    overrides: tuple[str, ...] = (),
    out: str | None = None,
    address: str | None = None,
    verbose: bool = False,
    models: str | None = None,
    alone: bool = False,
) -> Json:
    """Trains a chain and returns the content of its run.json.

    `experiment` is a YAML path, a shipped experiment's name, or an Experiment; `overrides` are "dotted.key=value";
    `models` is a folder of model configs in place of the experiment's. With a family instead of a chain, the planner's
    first proposal is trained; run.json shows it. With `alone` what the chain is compared with is trained in its place,
    the last model without a chain, into the chain's folder with `-alone` behind its name; the chain's report then says
    what that reached.
    Raises InputError before any work, RunFailed or Interrupted during it; what was trained is kept. Where training
    diverged, RunFailed has the `overrides` with which it goes on from the last good state at half the learning rate.
    """
    from raychain import records
    from raychain.backend_ray.counting import over_cluster
    from raychain.core.storage import Folder, below
    from raychain.pages.worth import alone_address
    from raychain.pages.writing import leave_report
    from raychain.reporting.runlog import RUN
    from raychain.runs.alone import alone as baseline_of
    from raychain.runs.checks import check_experiment, writable
    from raychain.runs.driver import run_chain
    from raychain.runs.origins import remarks
    from raychain.runs.resolve import make_task

    given = opened(experiment, overrides, models)
    config = resolved(given)
    folder = out or below(config.storage, config.name)
    if alone:
        chain, folder, config = folder, alone_address(folder), baseline_of(config)
    check_experiment(config, address)
    writable(folder)
    # A folder given on its own may be anywhere, so nothing is written outside of it unless the experiment says where.
    shared = out is None or "storage" in config.model_fields_set
    store = writable(config.storage, "storage").address if shared else None
    with over_cluster(address, verbose):
        task = make_task(config, folder, store=store)
    for line in remarks(task):
        say(line)
    try:
        done = run_chain(task, address=address, verbose=verbose).content()
    except RunFailed as error:
        if error.overrides and given.family:
            error.overrides = (*_as_overrides(config), *error.overrides)
        raise
    if alone and records.is_taken(Folder(chain), RUN):
        leave_report(Folder(chain))  # which now says what its last model reaches alone
    return done


def resolved(experiment: Experiment) -> Experiment:
    """The experiment with a chain; the planner's first proposal where it has a family instead.

    Checkpoints whose models it does not name are asked for them. Raises InputError.
    """
    from raychain.runs.costing import with_chain
    from raychain.runs.origins import named

    resolved = named(with_chain(experiment))
    if not experiment.chain:
        chain = " → ".join(f"{stage.model} {stage.epochs}" for stage in resolved.chain)
        say(f"planned: {chain} (raychain plan says why)")
    return resolved


def _as_overrides(planned: Experiment) -> tuple[str, ...]:
    """What turns an experiment with a family into the one that the planner made of it."""
    chain = ", ".join(f"{{model: {json.dumps(stage.model)}, epochs: {stage.epochs}}}" for stage in planned.chain)
    return ("family=null", "allocation=null", f"chain=[{chain}]")
