"""Draws shards in several processes.

They are plain child interpreters rather than `multiprocessing` ones: those either fork a process that may hold Ray's
and torch's threads, or import the caller's main script again and so fail for scripts without a main guard.
"""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from raychain.demo.names import Name
from raychain.demo.pictures import Painter
from raychain.demo.shards import Arguments, Job, write_shard

# The child looks for modules where this process does, whatever the working folder.
CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from raychain.demo.workers import main; main()"


@dataclass(frozen=True)
class Task:
    """Some of a demo's shards, for one process. `masters` is the .npy file of the glyphs, shape (names, m, m, 4)."""

    arguments: Arguments
    names: list[Name]
    masters: str
    folder: str
    jobs: list[Job]


def draw(task: Task) -> Iterator[int]:
    """Writes the shards of a task; yields how many pictures it drew since it last yielded."""
    masters = np.load(task.masters, mmap_mode="r")
    painter = Painter(task.arguments.size, masters, [name.pick for name in task.names])
    for job in task.jobs:
        yield from write_shard(job, task.arguments, task.names, painter, Path(task.folder))


def draw_all(tasks: list[Task], on_drawn: Callable[[int], None]) -> None:
    """Draws all tasks, one process each (a single one in this process), and calls `on_drawn` here with each progress.

    Raises:
        ChildProcessError: a process failed; its own message went to stderr.
    """
    if len(tasks) == 1:
        for count in draw(tasks[0]):
            on_drawn(count)
        return
    # Their own session: an interrupt at the terminal reaches this process alone, which then ends them.
    command = [sys.executable, "-c", CHILD, json.dumps(sys.path)]
    pipe = subprocess.PIPE
    children = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)  # noqa: S603
        for _ in tasks
    ]
    try:
        reports: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for child, task in zip(children, tasks, strict=True):
            threading.Thread(target=_converse, args=(child, task, reports), daemon=True).start()
        running = len(children)
        while running:
            drawn = reports.get()
            if drawn is None:
                running -= 1
            else:
                on_drawn(drawn)
        statuses = [child.wait() for child in children]
        if any(statuses):
            raise ChildProcessError(f"{sum(map(bool, statuses))} of {len(tasks)} drawing processes failed: {statuses}")
    finally:
        for child in children:
            child.kill()
            child.wait()


def main() -> None:
    """The child's side: a task as JSON on stdin, numbers of drawn pictures on stdout, a line each."""
    given = json.load(sys.stdin)
    task = Task(
        arguments=Arguments(**given["arguments"]),
        names=[Name(**name) for name in given["names"]],
        masters=given["masters"],
        folder=given["folder"],
        jobs=[Job(**job) for job in given["jobs"]],
    )
    for drawn in draw(task):
        print(drawn, flush=True)


def _converse(child: subprocess.Popen[str], task: Task, reports: "queue.SimpleQueue[int | None]") -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with suppress(BrokenPipeError):  # a child that failed at once; its exit status tells
            with child.stdin:
                json.dump(asdict(task), child.stdin)
            for line in child.stdout:
                reports.put(int(line))
    finally:
        reports.put(None)
