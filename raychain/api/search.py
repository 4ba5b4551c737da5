"""`raychain.search`: finds a better chain by measurement, training each stage that trials share once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raychain.config import Experiment, opened

if TYPE_CHECKING:
    from raychain.searching.driver import Searched


def search(
    experiment: str | Experiment,
    *,
    trials: int | None = None,
    overrides: tuple[str, ...] = (),
    out: str | None = None,
    address: str | None = None,
    verbose: bool = False,
    models: str | None = None,
) -> Searched:
    """Tries chains as the experiment's `search` says and returns what it found: `.record` is search.json,
    `.best` and `.front` are trials of it, `.results` is Ray Tune's ResultGrid.

    `trials` replaces `search.trials`, `models` the experiment's folder of model configs. The same call again continues,
    with more trials too. The folder `out`, by default STORAGE/NAME-search, gets search.json and best.yaml, the best
    chain as an experiment.
    Raises InputError before any work, RunFailed or Interrupted during it; what was trained is kept.
    """
    from raychain.backend_ray.counting import over_cluster
    from raychain.config.search import Search
    from raychain.core.storage import below
    from raychain.reporting.trackers import check_trackers
    from raychain.runs.checks import check_compute, writable
    from raychain.searching.driver import run_search
    from raychain.searching.request import check_folder, plan_search

    config = opened(experiment, overrides, models)
    settings = config.search or Search()
    if trials is not None:
        settings = settings.model_copy(update={"trials": trials})
    config = config.model_copy(update={"search": settings})
    check_compute(config, address)
    check_trackers(config.track)
    folder = out or below(config.storage, f"{config.name}-search")
    check_folder(folder, "--out" if out else "storage")
    # As for a run: with a folder of its own nothing is written outside of it, unless the experiment says where.
    shared = out is None or "storage" in config.model_fields_set
    storage = writable(config.storage, "storage").address if shared else folder
    with over_cluster(address, verbose):
        plan = plan_search(config, writable(folder).address, storage)
    return run_search(plan, address=address, verbose=verbose)
