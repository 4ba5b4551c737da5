"""`raychain run`: trains the chain of an experiment; the same command again continues it."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from raychain.api.run import resolved, run
from raychain.cli.completing import experiments
from raychain.config import opened
from raychain.errors import one_line
from raychain.terminal import delivered, say


def run_command(
    experiment: Annotated[
        str, typer.Argument(help="YAML file, or the name of a shipped experiment.", autocompletion=experiments)
    ] = "demo",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value; may be repeated.")] = None,
    out: Annotated[str | None, typer.Option(help="Run folder; default STORAGE/NAME of the experiment.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default RAY_ADDRESS, else this machine.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")
    ] = False,
    models: Annotated[str | None, typer.Option(help="Folder of open_clip model configs: NAME.json.")] = None,
    alone: Annotated[
        bool,
        typer.Option("--alone", help="Train what the chain is compared with, the last model alone, into OUT-alone."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print run.json (or the plan) to stdout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's own messages.")] = False,
) -> None:
    """Train the chain of EXPERIMENT; the same command again continues it."""
    if dry_run:
        _dry_run(experiment, tuple(overrides or ()), out, address, models, as_json, alone)
        return
    changes = tuple(overrides or ())
    with redirect_stdout(sys.stderr):  # Ray prints warnings of its nodes to stdout, which is for results
        result = run(
            experiment, overrides=changes, out=out, address=address, verbose=verbose, models=models, alone=alone
        )
    if as_json:
        say(json.dumps(result, indent=2), sys.stdout)
    else:
        from raychain.reporting.table import result_table

        result_table(result)


def _dry_run(
    experiment: str,
    overrides: tuple[str, ...],
    out: str | None,
    address: str | None,
    models: str | None,
    as_json: bool,
    alone: bool,
) -> None:
    from raychain.core.storage import below
    from raychain.core.wording import several, uncounted
    from raychain.data.commands import unexecuted
    from raychain.data.index import described
    from raychain.runs.alone import alone as baseline_of
    from raychain.runs.checks import check_experiment, writable
    from raychain.runs.resolve import dry_plan

    with unexecuted():
        config = resolved(opened(experiment, overrides, models))
    if alone:
        config = baseline_of(config)
    check_experiment(config, address)
    writable(out or below(config.storage, config.name))
    plan = dry_plan(config)
    if as_json:
        say(json.dumps({"config": config.model_dump(mode="json"), **plan}, indent=2), sys.stdout)
    for stage in [] if as_json else plan["stages"]:
        steps = (
            f"{several(stage['steps'], 'step')}, {several(stage['epochs'], 'epoch', 'g')}"
            if stage["steps"]
            else "given"
        )
        state = "published" if stage["published"] else steps
        name = one_line(stage["model"])
        say(f"{name:20} {stage['params'] / 1e6:9.2f} M parameters  {stage['macs']:.3g} MACs  {state}", sys.stdout)
    for line in [] if as_json else uncounted(plan["stages"]):
        say(one_line(line), sys.stdout)
    if plan["counts"] and not as_json:
        say(f"counts: {described(plan['counts'])}", sys.stdout)
    delivered()
