"""Ctrl-C, SIGTERM and SIGHUP at any moment: status 130, `interrupted` in run.json, and nothing of Ray's is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from raychain import signals


class Program:
    """`python -m raychain.run`; what it starts is known by a mark in the environment."""

    def __init__(self, folder: Path, tree: dict[str, Any], command: str = "raychain.run", **environment: str) -> None:
        (folder / "marked.yaml").write_text(yaml.safe_dump(tree))
        self.out, self._mark = folder / "out", uuid.uuid4().hex
        self._errors = (folder / "errors").open("w+")
        words = [sys.executable, "-m", command, str(folder / "marked.yaml"), "--out", str(self.out)]
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            words, stderr=self._errors, env=plain | environment | {"MARK": self._mark}, start_new_session=True
        )

    @property
    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def processes(self) -> dict[int, str]:
        """Everything with the mark, but for the program itself."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in (folder / "environ").read_bytes() and int(folder.name) != self.process.pid:
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        return found

    def wait_for(self, what: str, seconds: float = 200) -> None:
        """Until the program has said or started it."""
        until = time.monotonic() + seconds
        while what not in self.errors and not any(what in command for command in self.processes().values()):
            assert self.process.poll() is None, self.errors
            assert time.monotonic() < until, self.errors
            time.sleep(0.05)

    def ended(self) -> tuple[int, str | None]:
        """Exit status, and the status in run.json."""
        status = self.process.wait(150)
        assert "Traceback" not in self.errors
        file = self.out / "run.json"
        return status, json.loads(file.read_text())["status"] if file.exists() else None


@pytest.fixture
def endless(tree: dict[str, Any]) -> dict[str, Any]:
    return tree | {"chain": [{"model": "CoM-micro-S", "epochs": "100000 steps"}], "evaluate": {}}


@contextlib.contextmanager
def program(folder: Path, tree: dict[str, Any], command: str = "raychain.run", **environment: str) -> Iterator[Program]:
    started = Program(folder, tree, command, **environment)
    try:
        yield started
        until = time.monotonic() + 10
        while (left := started.processes()) and time.monotonic() < until:
            time.sleep(0.1)
        assert not left
    finally:
        for process in (*started.processes(), *([] if started.process.poll() is not None else [started.process.pid])):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def test_a_signal_while_the_program_is_still_importing(endless, tmp_path):
    with program(tmp_path, endless) as run:
        until = time.monotonic() + 30
        caught = 1 << (signal.SIGTERM - 1)
        while time.monotonic() < until:
            words = dict(
                line.split(":", 1) for line in Path(f"/proc/{run.process.pid}/status").read_text().splitlines()
            )
            if int(words["SigCgt"], 16) & caught:
                break
        run.process.send_signal(signal.SIGTERM)
        assert run.ended() == (130, None)
        assert "interrupted" in run.errors


@pytest.mark.slow
def test_three_signals_to_the_whole_group_while_ray_starts(endless, tmp_path):
    with program(tmp_path, endless) as run:
        run.wait_for("raylet/raylet")
        for _ in range(3):
            os.killpg(run.process.pid, signal.SIGTERM)
            time.sleep(0.3)
        assert run.ended() == (130, "interrupted")


@pytest.mark.slow
def test_two_signals_while_it_trains_in_a_hostile_environment(endless, tmp_path):
    """No home folder that can be written, and a folder for temporary files that is too long for Ray's sockets."""
    long = tmp_path / ("long" * 20)
    long.mkdir()
    with program(tmp_path, endless, HOME="/proc/1", TMPDIR=str(long)) as run:
        run.wait_for("loss")
        run.process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.ended() == (130, "interrupted")
        assert "stopping: the workers save" in run.errors


@pytest.mark.long
def test_a_signal_to_every_process_as_systemd_and_slurm_send_it(endless, tmp_path):
    with program(tmp_path, endless) as run:
        run.wait_for("loss")
        for process in (run.process.pid, *run.processes()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
        assert run.ended() == (130, "interrupted")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("moment", [("planned", 1.0), ("gcs_server", 0.0), ("raylet/raylet", 1.5), ("loss", 0.0)])
def test_any_signal_at_any_moment(endless, tmp_path, number, group, moment):
    what, pause = moment
    with program(tmp_path, endless) as run:
        if what == "planned":
            until = time.monotonic() + 60
            while not (run.out / "run.json").exists() and time.monotonic() < until:
                time.sleep(0.01)
        else:
            run.wait_for(what)
            time.sleep(pause)
        (os.killpg if group else os.kill)(run.process.pid, number)
        assert run.ended() == (130, "interrupted")


@pytest.mark.long
def test_a_search_is_interrupted_while_ray_starts_and_while_it_trains(endless, tree, tmp_path):
    space = {"models": "CoM-micro-{S,M}", "first": "90000 steps", "grown": ["90000 steps"], "alpha": 2}
    search = {"trials": 2, "seeds": 0, "space": space, "sampler": "grid"}
    searched = {k: v for k, v in endless.items() if k != "chain"} | {"family": "CoM-micro-{S,M}", "search": search}
    searched["evaluate"] = {"zero_shot": tree["evaluate"]["zero_shot"]}
    for moment in ("raylet/raylet", "loss"):
        folder = tmp_path / moment[:4]
        folder.mkdir()
        with program(folder, searched, command="raychain.search") as run:
            run.wait_for(moment)
            os.killpg(run.process.pid, signal.SIGTERM)
            time.sleep(0.5)
            run.process.send_signal(signal.SIGTERM)
            assert run.process.wait(150) == 130
            assert "Traceback" not in run.errors


@pytest.fixture
def taken_over() -> Iterator[None]:
    signals.take_over()
    yield
    signals.take_over()


def send() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)


def test_only_the_first_signal_raises(taken_over):
    with pytest.raises(KeyboardInterrupt):
        send()
    send()
    assert signals.interrupted()


def test_the_first_saves_and_the_second_raises(taken_over):
    asked = []
    with pytest.raises(KeyboardInterrupt), signals.saving(lambda: asked.append(1)):  # noqa: PT012
        send()
        assert asked == [1]
        send()
    send()
    assert asked == [1]


def test_a_held_signal_is_raised_when_it_is_asked_for(taken_over):
    done = []
    with signals.held():
        send()
        with pytest.raises(KeyboardInterrupt), signals.released():
            done.append("not reached")
        done.append("held")
    assert done == ["held"]


def test_a_signal_after_the_outcome_changes_nothing(taken_over):
    with signals.settled():
        send()
    signals.check()
    assert not signals.interrupted()


@pytest.mark.ray
def test_sigterm_is_still_handled_when_ray_has_ended() -> None:
    """Ray's C++ part puts the default action in the place of Python's handler as it ends."""
    script = (
        "import re, signal, sys, ray\n"
        "from raychain import signals\n"
        "from raychain.backend_ray.connection import _Connection\n"
        "def look():\n"
        "    caught = int(re.search(r'SigCgt:\\s*(\\w+)', open('/proc/self/status').read())[1], 16)\n"
        "    found.append(all(caught >> (n - 1) & 1 for n in (signal.SIGTERM, signal.SIGINT)))\n"
        "found, end = [], None\n"
        "signals.take_over()\n"
        "connection = _Connection(lambda: ray.init('local', num_cpus=1, include_dashboard=False), RuntimeError, 60)\n"
        "connection.open()\n"
        "end = connection._processes.end\n"
        "connection._processes.end = lambda: (look(), end())  # what is done when Ray has ended\n"
        "connection.close()\n"
        "sys.exit(0 if found == [True] else 7)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120).returncode == 0
