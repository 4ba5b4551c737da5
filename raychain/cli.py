"""The `raychain` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raychain.grow import grow_command
from raychain.run import guarded, run_command

commands = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
data = typer.Typer(no_args_is_help=True, help="Make data.")
commands.add_typer(data, name="data")
commands.command("run")(run_command)
commands.command("grow")(grow_command)


@data.command("demo")
def demo_command(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    names: Annotated[int, typer.Option(help="Emoji names (classes).")] = 240,
    pictures: Annotated[int, typer.Option(help="Training pictures.")] = 16_000,
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0,
) -> None:
    """Render OpenMoji pictures with captions as webdataset shards."""
    from raychain.demo import DemoError, make_demo
    from raychain.errors import InputError

    try:
        summary = make_demo(out, names=names, pictures=pictures, seed=seed)
    except DemoError as error:
        raise InputError("raychain data demo", out, "a new folder and drawable numbers", str(error)) from None
    counts = ", ".join(f"{folder} {count:,}" for folder, count in summary.counts.items())
    print(f"{summary.folder}: {counts} pictures of {names} names ({summary.bytes / 2**20:.0f} MiB)")


def app() -> None:
    """Entry point with raychain's exit statuses."""
    guarded(commands)


if __name__ == "__main__":
    app()
