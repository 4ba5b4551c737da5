"""Every model name of open_clip and timm, checked as `raychain run --dry-run` checks a chain of that model alone.

Each name is usable or refused with one message; anything else (another error, something printed, a connection that was
asked for) is a fault, and the exit status is then 1. Models are built on the meta device: no weights, no downloads.
Usage: python experiments/models/sweep.py [--out FILE] [NAME or PATTERN …]
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import open_clip
import timm

from raychain.config.loading import validate
from raychain.errors import InputError
from raychain.runs.checks import check_chain

HERE = Path(__file__).parent


class Outcome(NamedTuple):
    """What became of a name: `usable`, `refused` with a message, or `fault` with what happened."""

    name: str
    outcome: str
    message: str
    seconds: float


def names() -> list[str]:
    """Every name of open_clip's registry (raychain's families are in it) and of timm's."""
    return list(dict.fromkeys([*open_clip.list_models(), *timm.list_models()]))


def try_name(name: str) -> Outcome:
    """Checks one name, with nothing said and no connection made."""
    started, said = time.perf_counter(), io.StringIO()
    outcome, message = "usable", ""
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _offline():
            check_chain(validate(_experiment(name)))
    except InputError as error:
        outcome, message = "refused", " | ".join(str(error).split("\n  "))
    except Exception as error:
        outcome, message = "fault", f"{type(error).__name__}: {error}"
    if said.getvalue():
        outcome, message = "fault", f"it printed {said.getvalue()[:200]!r}"
    return Outcome(name, outcome, message, round(time.perf_counter() - started, 2))


def kind(message: str) -> str:
    """What messages of refusal have in common."""
    kinds = {
        "Hugging Face text tower": "text tower to download",
        "Hugging Face tokenizer": "tokenizer to download",
        "CoCa": "caption decoder",
        "cannot be run": "cannot be run as open_clip builds it",
        "cannot build it": "cannot be built by open_clip",
        "not one vector": "no vector a picture",
    }
    return next((short for part, short in kinds.items() if part in message), "other")


def _experiment(name: str) -> dict[str, Any]:
    return {"name": "sweep", "data": {"train": "none.tar"}, "chain": [{"model": name, "epochs": 1}]}


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a connection was asked for")

    kept = socket.socket.connect, socket.getaddrinfo
    socket.socket.connect, socket.getaddrinfo = refuse, refuse  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        socket.socket.connect, socket.getaddrinfo = kept  # type: ignore[method-assign]


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweeps, writes the table and prints counts and refusals; 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", help="names or globs; all without")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    options = parser.parse_args(arguments)
    chosen = [n for n in names() if not options.patterns or any(fnmatch.fnmatchcase(n, p) for p in options.patterns)]
    found = []
    for number, name in enumerate(chosen, 1):
        found.append(try_name(name))
        print(f"\r{number}/{len(chosen)} {name:40}", end="", file=sys.stderr, flush=True)
        if number % 25 == 0:
            _write(options.out, found)  # what there is, should the rest not come
    print(file=sys.stderr)
    for result in found:
        if result.outcome != "usable":
            print(f"{result.outcome} {result.name}: {result.message}")
    counts = _write(options.out, found)
    for what, count in counts.items():
        print(f"{count:5} {what}")
    return int("fault" in counts)


def _write(out: Path, found: Sequence[Outcome]) -> dict[str, int]:
    """Writes the table, and returns how many names came to what, most first."""
    counts = Counter(f"refused: {kind(r.message)}" if r.outcome == "refused" else r.outcome for r in found)
    versions = {"open_clip": open_clip.__version__, "timm": timm.__version__}
    table = {result.name: [result.outcome, result.message] for result in found}
    document = {"versions": versions, "counts": dict(counts.most_common()), "names": table}
    out.write_text(json.dumps(document, indent=1) + "\n")
    return dict(counts.most_common())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
