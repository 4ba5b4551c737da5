"""The `raychain` command, one module a command."""

from __future__ import annotations

from collections.abc import Sequence


def app(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line, by default the process's own, and exits with raychain's exit statuses."""
    from raychain.cli.commands import commands
    from raychain.cli.program import guarded

    guarded(commands, arguments)
