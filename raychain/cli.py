"""The `raychain` command."""

from __future__ import annotations

import typer

from raychain.data import data
from raychain.evaluate import evaluate_command
from raychain.grow import grow_command
from raychain.plan import plan_command
from raychain.report import report_command
from raychain.run import guarded, run_command
from raychain.search import search_command

commands = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
commands.add_typer(data, name="data")
commands.command("run")(run_command)
commands.command("plan")(plan_command)
commands.command("evaluate")(evaluate_command)
commands.command("search")(search_command)
commands.command("grow")(grow_command)
commands.command("report")(report_command)


def app() -> None:
    """Entry point with raychain's exit statuses."""
    guarded(commands)


if __name__ == "__main__":
    app()
