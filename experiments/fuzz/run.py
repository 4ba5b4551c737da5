"""Hostile inputs of five kinds through raychain's commands: tars, tables, experiments, checkpoints, run folders.

Each kind has a worker process of its own (`worker.py`), in which Hypothesis draws inputs (`kinds.py`) and the commands
are called on them. A fault is an exception that is not one of raychain's own messages, more than 10 s, or more than
2 GiB of the worker or one of its children. It is saved under --faults as a file that --replay takes; inputs that raise
are made smaller first, and what takes too long is tried again in a fresh worker before it counts. The kinds take turns
on one core; the time in which a worker starts, or waits for a core that other programs have, does not count. Exit
status 1: there was a fault. Ctrl-C ends it with a record of what there is.
Usage: python experiments/fuzz/run.py [--minutes 10] [--seed N] [--kinds tar,table] [--replay FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KINDS = ("tar", "table", "yaml", "checkpoint", "run folder")
LIMIT_S, LIMIT_BYTES = 10.0, 2 * 2**30
START_S = 300.0
"""A worker may take this long to import what it needs."""
TURN_S = 20.0
"""A kind's turn."""
KILLED_AT = 2 * LIMIT_BYTES
"""Bytes at which a worker is ended, for the machine's sake."""


@dataclass
class Tally:
    """What came of one kind's inputs."""

    outcomes: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, str]] = field(default_factory=list)
    slowest_s: float = 0.0
    peak_bytes: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {
            "inputs": sum(self.outcomes.values()),
            **self.outcomes,
            "commands": dict(self.commands.most_common()),
            "seconds": round(self.seconds),
            "slowest_s": round(self.slowest_s, 2),
            "peak_mib": round(self.peak_bytes / 2**20),
            "faults": self.faults,
        }


class Worker:
    """A process that draws inputs of one kind, and tries each when it is told to."""

    def __init__(self, kind: str, seed: int, faults: Path, replay: Path | None = None) -> None:
        self.kind = kind
        self._scratch = tempfile.TemporaryDirectory(prefix="raychain-fuzz-")
        self.current = Path(self._scratch.name) / "current.json"
        """The input that is being tried."""
        reading, writing = os.pipe()
        arguments = [kind, str(seed), str(writing), self._scratch.name, str(faults), *([str(replay)] if replay else [])]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        with (Path(self._scratch.name) / "log").open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603 - this very interpreter
                [sys.executable, str(HERE / "worker.py"), *arguments], bufsize=0,
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[writing], start_new_session=True,
                env=environment,
            )  # fmt: skip
        os.close(writing)
        self._pipe, self._rest = reading, b""

    def go(self) -> None:
        """Has it try the input that it waits with."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"g")

    def messages(self, seconds: float) -> Iterator[dict[str, Any] | None]:
        """What the worker says within so many seconds; None now and then where it says nothing. It ends with it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not select.select([self._pipe], [], [], min(0.1, max(0.0, end - time.monotonic())))[0]:
                yield None
                continue
            read = os.read(self._pipe, 2**16)
            if not read:
                return
            *lines, self._rest = (self._rest + read).split(b"\n")
            yield from map(json.loads, lines)

    def clock(self) -> float:
        """Seconds, those not counted in which it waited for a core that others had."""
        return time.monotonic() - waited(self.process.pid)

    def memory(self) -> int:
        """Resident bytes of the process and its children."""
        total = 0
        for pid in self._group():
            with contextlib.suppress(OSError, ValueError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return total

    def close(self) -> str:
        """Ends it and its children; returns the end of what it printed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._pipe)
        said = (Path(self._scratch.name) / "log").read_text(errors="replace")[-2000:]
        self._scratch.cleanup()
        return said

    def _group(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with contextlib.suppress(OSError):
            return [self.process.pid, *map(int, children.read_text().split())]
        return [self.process.pid]


class Fuzzing:
    """The workers of all kinds and what came of their inputs."""

    def __init__(self, kinds: Sequence[str], seed: int, faults: Path) -> None:
        self._seed, self._faults = seed, faults
        self.tallies = {kind: Tally() for kind in kinds}
        self._workers: dict[str, Worker] = {}

    def run(self, seconds: float) -> None:
        """Gives the kinds turns until they have had so many seconds together, or Ctrl-C."""
        with contextlib.suppress(KeyboardInterrupt):
            while sum(tally.seconds for tally in self.tallies.values()) < seconds:
                kind = min(self.tallies, key=lambda kind: self.tallies[kind].seconds)
                self._turn(kind, min(TURN_S, seconds / len(self.tallies)))
                self._show()
        for worker in self._workers.values():
            worker.close()

    def _turn(self, kind: str, seconds: float) -> None:
        worker, tally = self._workers.get(kind), self.tallies[kind]
        if worker is None:
            worker = self._workers[kind] = self._started(kind)
        began = begun = last = worker.clock()
        worker.go()
        for message in worker.messages(TURN_S + 10 * START_S):
            now = worker.clock()
            if message and "outcome" in message:
                begun = math.inf
                self._ended(tally, message)
            elif message and now - began >= seconds:
                tally.seconds += now - last
                break
            elif message:
                begun = now
                worker.go()
            tally.seconds += now - last
            last = now
            if now - begun > LIMIT_S:
                self._overdue(kind, worker, f"more than {LIMIT_S:g} s")
                break
            if message is None and worker.memory() > KILLED_AT:
                self._overdue(kind, worker, f"more than {KILLED_AT / 2**30:g} GiB")
                break
        else:
            self._overdue(kind, worker, f"the process ended: {worker.process.poll()}")

    def _started(self, kind: str) -> Worker:
        self._seed += 1
        worker = Worker(kind, self._seed, self._faults)
        for message in worker.messages(START_S):
            if message:
                return worker
        raise SystemExit(f"the worker for {kind} did not start: {worker.close()}")

    def _ended(self, tally: Tally, message: dict[str, Any]) -> None:
        tally.outcomes[message["outcome"]] += 1
        tally.commands.update(message["commands"])
        tally.slowest_s = max(tally.slowest_s, message["seconds"])
        tally.peak_bytes = max(tally.peak_bytes, message["peak"])
        if fault := message.get("fault"):
            tally.faults.append(fault)

    def _overdue(self, kind: str, worker: Worker, what: str) -> None:
        """Ends the worker, and notes a fault where the same comes of the input once more."""
        name = self._faults / f"{kind.replace(' ', '-')}-{int(time.time())}.json"
        name.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            name.write_bytes(worker.current.read_bytes())
        said = worker.close()
        del self._workers[kind]
        if name.exists() and replay(name) == "ended":
            name.unlink()
            self.tallies[kind].outcomes["slow once"] += 1
            return
        self.tallies[kind].outcomes["fault"] += 1
        self.tallies[kind].faults.append({"what": what, "file": name.name, "said": said[-300:]})

    def _show(self) -> None:
        counts = (f"{kind} {sum(t.outcomes.values())} ({len(t.faults)})" for kind, t in self.tallies.items())
        print(f"inputs (faults): {', '.join(counts)}", file=sys.stderr, flush=True)


def waited(pid: int) -> float:
    """Seconds in which a process was ready to go on and had no core; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def replay(file: Path, told: bool = False) -> str:
    """Tries one saved input in a fresh worker: `ended`, whatever came of it, or what did not end."""
    kind = json.loads(file.read_text())["kind"]
    worker = Worker(kind, 0, file.parent, file)
    begun, outcome = math.inf, "did not end"
    for message in worker.messages(START_S):
        if message and "outcome" in message:
            outcome = "ended"
            if told:
                print(json.dumps(message, indent=1))
            break
        if message:
            begun = worker.clock()
            worker.go()
        if worker.clock() - begun > LIMIT_S:
            outcome = "too slow"
            break
        if worker.memory() > KILLED_AT:
            outcome = "too large"
            break
    worker.close()
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the kinds in turn and writes the record; 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--out", type=Path, default=HERE / "record.json")
    parser.add_argument("--faults", type=Path, default=HERE / "faults")
    parser.add_argument("--replay", type=Path, help="Try one saved input, and print what came of it.")
    options = parser.parse_args(arguments)
    if options.replay:
        print(replay(options.replay, told=True))
        return 0
    fuzzing = Fuzzing(options.kinds.split(","), options.seed, options.faults.absolute())
    fuzzing.run(60 * options.minutes)
    record = {
        "command": f"python experiments/fuzz/run.py --minutes {options.minutes:g} --seed {options.seed}",
        "minutes": round(sum(tally.seconds for tally in fuzzing.tallies.values()) / 60, 1),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {"platform": platform.platform(), "cpu": _cpu(), "python": platform.python_version()},
        "limits": {"seconds": LIMIT_S, "bytes": LIMIT_BYTES},
        "kinds": {kind: tally.as_dict() for kind, tally in fuzzing.tallies.items()},
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    faults = sum(len(tally.faults) for tally in fuzzing.tallies.values())
    print(f"{sum(sum(t.outcomes.values()) for t in fuzzing.tallies.values()):,} inputs, {faults} faults: {options.out}")
    return int(faults > 0)


def _commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603 - fixed words


def _cpu() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
