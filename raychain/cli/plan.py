"""`raychain plan`: what a chain costs before it is trained, or which chains the principles propose for a family."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from raychain.cli.completing import experiments
from raychain.errors import InputError
from raychain.terminal import delivered, say

if TYPE_CHECKING:  # torch is imported by what plans, not by --help
    pass
from raychain.api.plan import plan


def plan_command(
    experiment: Annotated[
        str, typer.Argument(help="YAML file, or the name of a shipped experiment.", autocompletion=experiments)
    ],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value; may be repeated.")] = None,
    tflops: Annotated[
        float | None, typer.Option(min=1e-6, help="Hours from the peak of one accelerator, in dense TFLOP/s.")
    ] = None,
    mfu: Annotated[float, typer.Option(min=1e-6, max=1, help="Share of --tflops that training reaches.")] = 0.4,
    throughput: Annotated[
        str | None, typer.Option(help="Hours from samples a second over all workers: one a stage, with commas.")
    ] = None,
    like: Annotated[str | None, typer.Option(help="Hours from the speed of a finished run: its folder.")] = None,
    models: Annotated[str | None, typer.Option(help="Folder of open_clip model configs: NAME.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """What the chain of EXPERIMENT costs; with a family, which chains the paper's principles propose."""
    result = plan(
        experiment,
        overrides=tuple(overrides or ()),
        tflops=tflops,
        mfu=mfu,
        throughput=_numbers(throughput),
        like=like,
        models=models,
    )
    if as_json:
        say(json.dumps(result, indent=2), sys.stdout)
    else:
        from raychain.reporting.plan_table import plan_table

        plan_table(result)
    delivered()


def _numbers(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        numbers = tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) <= 0:
        raise InputError("--throughput", text, "numbers above zero, with commas", "for example --throughput 9000,4000")
    return numbers
