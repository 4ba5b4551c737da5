"""The catalogue of input errors, read from the calls in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parents[2] / "raychain"


class Refusal(NamedTuple):
    """One input error: where it is, what is allowed there and how to mend it, with `…` for what a run fills in."""

    where: str
    allowed: str
    fix: str


def refusals() -> Iterator[Refusal]:
    """Every input error whose three parts stand in the call itself."""
    seen = set()
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "InputError":
                parts = [_text(argument) for argument in node.args[:4]]
                if len(parts) == 4 and parts[2] and parts[3]:
                    found = Refusal(parts[0] or "…", parts[2], parts[3])
                    if found not in seen:
                        seen.add(found)
                        yield found


def errors_table() -> str:
    """The table as Markdown, in the order of the places."""
    lines = ["| where | allowed | how to mend it |", "|---|---|---|"]
    for found in sorted(refusals()):
        lines.append("| " + " | ".join(part.replace("|", "\\|").replace("\n", " ") for part in found) + " |")
    return "\n".join(lines)


def _text(node: ast.expr) -> str:
    """A message as it stands in the source, with `…` for what is filled in; nothing where it is made elsewhere."""
    match node:
        case ast.Constant(str(value)):
            return value
        case ast.JoinedStr(parts):
            return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts)
        case ast.Call(ast.Name("nearest"), [_, _, instead]):
            return f"the nearest known name, or: {_text(instead)}"
        case ast.BinOp(left, ast.Add(), right):
            return _text(left) + (_text(right) or "…")
        case ast.BoolOp(_, [first, *_]):
            return _text(first)
        case ast.IfExp(_, body, _):
            return _text(body)
    return ""
