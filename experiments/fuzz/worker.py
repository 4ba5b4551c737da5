"""The process in which inputs of one kind are drawn and tried; `run.py` starts it and tells it when to try the next."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "tests")]

import kinds  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis.errors import HypothesisException, HypothesisWarning  # noqa: E402
from kinds import Case  # noqa: E402
from run import waited  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from raychain.cli.commands import commands  # noqa: E402
from raychain.errors import InputError, Interrupted, RunFailed  # noqa: E402

SHRINKING = 150
"""Tries that are spent on making an input smaller."""
LARGEST = 2 * 2**30


class Outcome(NamedTuple):
    """`accepted` or `refused`, or `fault` with its traceback."""

    outcome: str
    said: str = ""


class Fault(Exception):  # noqa: N818 - for Hypothesis, to shrink the input
    """The input led to a fault."""


def attempt(case: Case, folder: Path) -> list[Outcome]:
    """What came of each step of a case, in a new folder."""
    rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.chdir(folder)
    return [step(files, arguments, folder) for files, arguments in case]


def step(files: Mapping[str, bytes], arguments: Sequence[str] | Callable[[Path], None], folder: Path) -> Outcome:
    """Writes the files and calls the command on them."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    hooked: list[str] = []
    threading.excepthook = lambda found: hooked.append("".join(traceback.format_exception(found.exc_value)))
    if callable(arguments):
        error = called(arguments, folder)
    else:
        result = CliRunner().invoke(commands, list(arguments))
        error = result.exception
        hooked += [result.output] if "Traceback (most recent" in result.output else []
    if isinstance(error, InputError | RunFailed | Interrupted):
        str(error)
    elif error is not None and not (isinstance(error, SystemExit) and error.code in (0, 1, 2)):
        return Outcome("fault", "".join(traceback.format_exception(error)))
    if hooked:
        return Outcome("fault", hooked[0])
    refused = isinstance(error, InputError | RunFailed | Interrupted) or (isinstance(error, SystemExit) and error.code)
    return Outcome("refused" if refused else "accepted")


def called(action: Callable[[Path], None], folder: Path) -> BaseException | None:
    """What a function raises."""
    try:
        action(folder)
    except Exception as error:
        return error
    return None


def signature(said: str) -> str:
    """What faults of one cause have in common: the kind of error, and where raychain was."""
    lines = said.splitlines()
    frames = [line.strip() for line in lines if line.startswith("  File") and "/raychain/" in line]
    return f"{lines[-1].partition(':')[0]} {frames[-1].rpartition('/raychain/')[2] if frames else ''}"


class Trying:
    """Tries inputs and tells `run.py` of each."""

    def __init__(self, kind: str, pipe: int, scratch: Path, faults: Path) -> None:
        self.kind, self._pipe, self._scratch, self._faults = kind, pipe, scratch, faults
        self._known: set[str] = set()
        self._smallest: dict[str, tuple[int, Case, str]] = {}
        self._shrinking = 0

    def tell(self, **message: Any) -> None:
        """Sends one message."""
        os.write(self._pipe, json.dumps(message).encode() + b"\n")

    def wait(self) -> None:
        """Returns when `run.py` says so; ends the process when that has ended."""
        self.tell(waiting=True)
        if not os.read(0, 1):
            os._exit(0)

    def one(self, case: Case) -> None:
        """Tries one input. Raises Fault for one with a new fault, while it is worth making it smaller."""
        if self._shrinking > SHRINKING:
            return
        document = saved(self.kind, case)
        (self._scratch / "current.json").write_text(document)
        self.wait()
        forget_peak()
        children, started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, clock()
        outcomes = attempt(case, self._scratch / "case")
        seconds, own = clock() - started, peak()
        after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        largest = max(own, 1024 * after if after > children else 0)
        found = next((o for o in outcomes if o.outcome == "fault"), None)
        if found is None and largest > LARGEST:
            found = Outcome("fault", f"MemoryError: {largest / 2**20:,.0f} MiB")
        mark = signature(found.said) if found else ""
        outcome = found.outcome if found else max((o.outcome for o in outcomes), key=["accepted", "refused"].index)
        named = [" ".join(a[:2]) if a[0] == "data" else a[0] for _, a in case if not callable(a)]
        named += [a.__name__ for _, a in case if callable(a)]
        fault = {"what": mark, "file": self._name(mark)} if found and mark not in self._known else None
        if found:
            self._keep(mark, case, document, found.said)
        shown = {"fault": fault} if fault else {}
        self._known.add(mark)
        self.tell(
            outcome=outcome, commands=named, seconds=seconds, peak=largest, said=found.said if found else "", **shown
        )
        if fault or self._shrinking:
            self._shrinking += 1
        if found and self._shrinking:
            raise Fault(mark)

    def _name(self, mark: str) -> str:
        return f"{self.kind.replace(' ', '-')}-{''.join(c if c.isalnum() else '-' for c in mark)[:80]}.json"

    def _keep(self, mark: str, case: Case, document: str, said: str) -> None:
        if mark not in self._smallest or len(document) < self._smallest[mark][0]:
            self._smallest[mark] = len(document), case, said
            self._faults.mkdir(parents=True, exist_ok=True)
            (self._faults / self._name(mark)).write_text(json.dumps(json.loads(document) | {"said": said}, indent=1))

    def round(self, number: int) -> None:
        """Draws inputs until one has a new fault, which is made smaller."""
        self._shrinking = 0
        with contextlib.suppress(Fault, HypothesisException, HypothesisWarning, BaseExceptionGroup):
            seed(number)(
                settings(
                    max_examples=300, database=None, deadline=None, phases=[Phase.generate, Phase.shrink],
                    suppress_health_check=list(HealthCheck), report_multiple_bugs=False, print_blob=False,
                )(given(kinds.KINDS[self.kind])(self.one))
            )()  # fmt: skip


def saved(kind: str, case: Case) -> str:
    """The case as JSON."""
    steps = [
        {
            "files": {name: base64.b64encode(content).decode() for name, content in files.items()},
            "command": arguments.__name__
            if callable(arguments)
            else [a.replace(str(kinds.BASE), "BASE") for a in arguments],
        }
        for files, arguments in case
    ]
    return json.dumps({"kind": kind, "steps": steps})


def loaded(document: Mapping[str, Any]) -> Case:
    """The reverse of `saved`."""
    return [
        (
            {name: base64.b64decode(content) for name, content in step["files"].items()},
            getattr(kinds, step["command"])
            if isinstance(step["command"], str)
            else [argument.replace("BASE", str(kinds.BASE)) for argument in step["command"]],
        )
        for step in document["steps"]
    ]


def clock() -> float:
    """As `Worker.clock`."""
    return time.monotonic() - waited(os.getpid())


def forget_peak() -> None:
    """Has `peak` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most resident bytes of this process since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def main() -> None:
    kind, number, pipe, scratch, faults, *replayed = sys.argv[1:]
    trying = Trying(kind, int(pipe), Path(scratch), Path(faults))
    kinds.prepare(Path(scratch) / "base")
    if replayed:
        document = json.loads(Path(replayed[0]).read_text())
        trying._faults = Path(scratch)
        with contextlib.suppress(Fault):
            trying.one(loaded(document))
        return
    for turn in range(10**6):
        trying.round(10**6 * int(number) + turn)


if __name__ == "__main__":
    main()
