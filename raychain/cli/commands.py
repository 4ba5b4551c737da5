"""The commands in one Typer app."""

from __future__ import annotations

import typer

from raychain.cli.data import data
from raychain.cli.doctor import doctor_command
from raychain.cli.evaluate import evaluate_command
from raychain.cli.export import export_command
from raychain.cli.grow import grow_command
from raychain.cli.init import init_command
from raychain.cli.plan import plan_command
from raychain.cli.report import report_command
from raychain.cli.run import run_command
from raychain.cli.search import search_command

commands = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pre-train a family of models as a chain, on Ray.",
)
commands.add_typer(data, name="data")
commands.command("init")(init_command)
commands.command("run")(run_command)
commands.command("plan")(plan_command)
commands.command("evaluate")(evaluate_command)
commands.command("search")(search_command)
commands.command("grow")(grow_command)
commands.command("export")(export_command)
commands.command("report")(report_command)
commands.command("doctor")(doctor_command)
