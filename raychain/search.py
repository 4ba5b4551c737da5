"""`raychain search`: finds a better chain by measurement, training each stage that trials share once."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from raychain import command
from raychain.config import Experiment, opened
from raychain.terminal import say

command(__name__)


def search(
    experiment: str | Experiment,
    *,
    trials: int | None = None,
    overrides: tuple[str, ...] = (),
    out: str | None = None,
    address: str | None = None,
    verbose: bool = False,
    models: str | None = None,
) -> dict[str, Any]:
    """Tries chains as the experiment's `search` says and returns the content of search.json.

    `trials` replaces `search.trials`, `models` the experiment's folder of model configs. The same call again continues,
    with more trials too. The folder `out`, by default STORAGE/NAME-search, gets search.json and best.yaml, the best
    chain as an experiment.
    Raises InputError before any work, RunFailed or Interrupted during it; what was trained is kept.
    """
    from raychain.chain.checks import check_compute, writable
    from raychain.config.search import Search
    from raychain.reporting.trackers import check_trackers
    from raychain.searching.driver import run_search
    from raychain.searching.request import plan_search
    from raychain.storage import below

    config = opened(experiment, overrides, models)
    settings = config.search or Search()
    if trials is not None:
        settings = settings.model_copy(update={"trials": trials})
    config = config.model_copy(update={"search": settings})
    check_compute(config, address)
    check_trackers(config.track)
    folder = out or below(config.storage, f"{config.name}-search")
    # As for a run: with a folder of its own nothing is written outside of it, unless the experiment says where.
    shared = out is None or "storage" in config.model_fields_set
    plan = plan_search(
        config, writable(folder).address, writable(config.storage, "storage").address if shared else folder
    )
    return run_search(plan, address=address, verbose=verbose)


def search_command(
    experiment: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped experiment.")],
    trials: Annotated[int | None, typer.Option(help="Chains to try; default search.trials of the file.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value; may be repeated.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the search; default STORAGE/NAME-search.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default RAY_ADDRESS, else this machine.")] = None,
    models: Annotated[str | None, typer.Option(help="Folder of open_clip model configs: NAME.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print search.json to stdout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's own messages.")] = False,
) -> None:
    """Find a better chain by measurement; the same command again continues."""
    options: dict[str, Any] = {"out": out, "address": address, "verbose": verbose, "models": models}
    with redirect_stdout(sys.stderr):  # as `raychain run` does
        result = search(experiment, trials=trials, overrides=tuple(overrides or ()), **options)
    if as_json:
        say(json.dumps(result, indent=2), sys.stdout)
    else:
        from raychain.reporting.search_table import search_table

        search_table(result)


if __name__ == "__main__":
    from raychain.run import main

    main(search_command, Path(sys.argv[0]).stem)
