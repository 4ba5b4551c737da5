"""`python -m raychain.run`: trains the chain of an experiment; the same command again continues it."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from raychain import command, signals
from raychain.config import Experiment, opened
from raychain.errors import InputError, Interrupted, RunFailed, one_line
from raychain.terminal import delivered, guard_streams, report_lost, say
from raychain.unexpected import describe

command(__name__)

KEPT = "What is done is kept; the same command continues."


def run(
    experiment: str | Experiment = "demo",
    *,
    overrides: tuple[str, ...] = (),
    out: str | None = None,
    address: str | None = None,
    verbose: bool = False,
    models: str | None = None,
) -> dict[str, Any]:
    """Trains a chain and returns the content of its run.json.

    `experiment` is a YAML path, a shipped experiment's name, or an Experiment; `overrides` are "dotted.key=value";
    `models` is a folder of model configs in place of the experiment's. With a family instead of a chain, the planner's
    first proposal is trained; run.json shows it.
    Raises InputError before any work, RunFailed or Interrupted during it; what was trained is kept. Where training
    diverged, RunFailed has the `overrides` with which it goes on from the last good state at half the learning rate.
    """
    from raychain.chain.checks import check_experiment, writable
    from raychain.chain.driver import run_chain
    from raychain.chain.resolve import make_task
    from raychain.storage import below

    given = opened(experiment, overrides, models)
    config = _resolved(given)
    check_experiment(config, address)
    folder = out or below(config.storage, config.name)
    writable(folder)
    # A folder given on its own may be anywhere, so nothing is written outside of it unless the experiment says where.
    shared = out is None or "storage" in config.model_fields_set
    store = writable(config.storage, "storage").address if shared else None
    task = make_task(config, folder, store=store)
    try:
        return run_chain(task, address=address, verbose=verbose)
    except RunFailed as error:
        if error.overrides and given.family:
            error.overrides = (*_as_overrides(config), *error.overrides)
        raise


def run_command(
    experiment: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped experiment.")] = "demo",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value; may be repeated.")] = None,
    out: Annotated[str | None, typer.Option(help="Run folder; default STORAGE/NAME of the experiment.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default RAY_ADDRESS, else this machine.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")
    ] = False,
    models: Annotated[str | None, typer.Option(help="Folder of open_clip model configs: NAME.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print run.json (or the plan) to stdout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's own messages.")] = False,
) -> None:
    """Train the chain of EXPERIMENT; the same command again continues it."""
    if dry_run:
        _dry_run(experiment, tuple(overrides or ()), out, address, models, as_json)
        return
    changes = tuple(overrides or ())
    with redirect_stdout(sys.stderr):  # Ray prints warnings of its nodes to stdout, which is for results
        result = run(experiment, overrides=changes, out=out, address=address, verbose=verbose, models=models)
    if as_json:
        say(json.dumps(result, indent=2), sys.stdout)
    else:
        from raychain.reporting.table import result_table

        result_table(result)


def _resolved(experiment: Experiment) -> Experiment:
    """The experiment with a chain; the planner's first proposal where it has a family instead."""
    from raychain.chain.costing import with_chain

    resolved = with_chain(experiment)
    if resolved is not experiment:
        chain = " → ".join(f"{stage.model} {stage.epochs}" for stage in resolved.chain)
        say(f"planned: {chain} (raychain plan says why)")
    return resolved


def _as_overrides(planned: Experiment) -> tuple[str, ...]:
    """What turns an experiment with a family into the one that the planner made of it."""
    chain = ", ".join(f"{{model: {json.dumps(stage.model)}, epochs: {stage.epochs}}}" for stage in planned.chain)
    return ("family=null", "allocation=null", f"chain=[{chain}]")


def _dry_run(
    experiment: str, overrides: tuple[str, ...], out: str | None, address: str | None, models: str | None, as_json: bool
) -> None:
    from raychain.chain.checks import check_experiment, writable
    from raychain.chain.resolve import dry_plan
    from raychain.storage import below

    config = _resolved(opened(experiment, overrides, models))
    check_experiment(config, address)
    writable(out or below(config.storage, config.name))
    plan = dry_plan(config)
    if as_json:
        say(json.dumps({"config": config.model_dump(mode="json"), **plan}, indent=2), sys.stdout)
    for stage in [] if as_json else plan["stages"]:
        state = "published" if stage["published"] else f"{stage['steps']:,} steps, {stage['epochs']:g} epochs"
        name = one_line(stage["model"])
        say(f"{name:20} {stage['params'] / 1e6:9.2f} M parameters  {stage['macs']:.3g} MACs  {state}", sys.stdout)
    delivered()


def main(command: Any, name: str) -> None:
    """Runs a command function as a program, with raychain's exit statuses."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name)(command)
    guarded(app)


def guarded(app: Any) -> None:
    """Calls a Typer app; errors become one message and a status: 1 run failed, 2 wrong input, 130 interrupted."""
    signals.take_over()
    guard_streams()
    try:
        status = _status(app)
    except KeyboardInterrupt:  # while an outcome was being told
        status = signals.ASKED
    signals.leave(status)


def _status(app: Any) -> int:
    try:
        app()
    except InputError as error:
        return _told(f"raychain: {error}", 2)
    except RunFailed as error:
        said = str(error).replace("\n", "\n  ")  # no line of an error looks like one of raychain's own
        return _told(f"raychain: the run failed: {said}\n{_way_on(error)}", 1)
    except (Interrupted, KeyboardInterrupt):
        return _told(f"raychain: interrupted. {KEPT}", signals.ASKED)
    except SystemExit as stop:  # Typer's own, also for KeyboardInterrupt
        if signals.interrupted():
            return _told(f"raychain: interrupted. {KEPT}", signals.ASKED)
        if stop.code:
            return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        return _told(describe(error), 1)
    report_lost()
    return 0


def _told(message: str, status: int) -> int:
    say(message)
    return status


def _way_on(error: RunFailed) -> str:
    """What to do about it."""
    if not error.overrides:
        return KEPT
    command = shlex.join([*sys.orig_argv, *(word for override in error.overrides for word in ("--set", override))])
    return f"What is done is kept. To go on with half the learning rate, or any that you put there:\n{command}"


if __name__ == "__main__":
    main(run_command, Path(sys.argv[0]).stem)
