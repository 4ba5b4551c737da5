"""Text that every Python brings along: its documentation by topics, and the docstrings of its standard library."""

from __future__ import annotations

import ast
import json
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raychain.core.json import Json
from raychain.dataprep.tokenize import Options, tokenize

HELD_OUT = 0.1
_LEAST = 64
"""Characters of a text that is worth a document."""
_SKIPPED = ("test", "tests", "idlelib", "site-packages", "lib2to3", "__pycache__")


def documents() -> Iterator[str]:
    """The topics of `help()`, then a text for each module with its docstrings, in the order of their names."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not any(part in _SKIPPED for part in path.relative_to(library).parts):
            text = docstrings(path, ".".join(path.relative_to(library).with_suffix("").parts))
            if len(text) >= _LEAST:
                yield text


def make_text(out: str | Path) -> Json:
    """Writes files of tokens, which are bytes, into the new folder `out`; see `tokenize`."""
    with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
        source = Path(scratch) / "python.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
        return tokenize([str(source)], out, Options(held_out=HELD_OUT))


def docstrings(path: Path, module: str) -> str:
    """The docstrings of a module, of its classes and of its functions, each under its name."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return ""
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            name = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
            called = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
            parts.append(f"{name}{called}\n\n{text}\n")
    return "\n".join(parts)
