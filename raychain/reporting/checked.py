"""What `raychain data check` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raychain.core.wording import MISSING
from raychain.errors import one_line
from raychain.terminal.console import make_console

SHOWN = 3
"""Examples of each kind."""


def check_table(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the summary of checked shards on stdout: counts, then the kinds of bad samples, each with examples, and
    those of samples that are used and worth a word."""
    console = console or make_console()
    counts = Table(box=None, show_header=False, pad_edge=False)
    bad = sum(result["bad"].values())
    for label, value in (
        ("shards", f"{result['shards']:,}"),
        ("samples", f"{result['samples']:,}"),
        ("usable", f"{result['usable']:,}"),
        ("bad", f"{bad:,} ({result['bad_fraction']:.2%}, allowed {result['max_bad_fraction']:.2%})"),
        ("missing captions", f"{result['missing_captions']:,}"),
        ("width", _spread(result["width"])),
        ("height", _spread(result["height"])),
        ("captions a picture", _spread(result["captions"])),
    ):
        counts.add_row(label, value)
    console.print(counts)
    for group in ("bad", "noted"):
        if not result[group]:
            continue
        kinds = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for heading in ("used, but" if group == "noted" else group, "count", "first examples"):
            kinds.add_column(heading, justify="right" if heading == "count" else "left", overflow="fold")
        for kind, count in result[group].items():
            examples = [item for item in result[f"{group}_samples"] if item["kind"] == kind][:SHOWN]
            kinds.add_row(kind, f"{count:,}", Text("\n".join(map(_example, examples))))
        console.print(kinds)


def _spread(values: Mapping[str, int] | None) -> str:
    return f"{values['min']:,} / {values['median']:,} / {values['max']:,} (min / median / max)" if values else MISSING


def _example(item: Mapping[str, Any]) -> str:
    name = item["shard"].rpartition("/")[2]
    return one_line(f"{name}: {item['key']}{' – ' if item['detail'] else ''}{item['detail']}")
