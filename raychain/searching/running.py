"""Trains a search's paths of stages on Ray: a worker group and a thread each, as `raychain run` would."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress

from raychain.errors import InputError, Interrupted, RunFailed
from raychain.reporting.events import Event
from raychain.runs.driver import Watch, run_chain
from raychain.searching.campaign import Job, JobEnded, Measured, Notice, StageDone, trunk_key

ShowEvent = Callable[[Job, Event], None]


class RayRunner:
    """Runs jobs on the Ray cluster this process is connected to. `show` gets (job, event) of all of them."""

    def __init__(self, show: ShowEvent, *, verbose: bool = False) -> None:
        self._show, self._verbose = show, verbose
        self._notices: queue.Queue[Notice] = queue.Queue()
        self._stops: dict[Job, threading.Event] = {}
        self._stopping = False

    def start(self, job: Job) -> None:
        """Begins; returns at once."""
        self._stops[job] = threading.Event()
        if self._stopping:  # by a signal meanwhile
            self._stops[job].set()
        threading.Thread(target=self._work, args=(job,), name=f"trial {job.trial.number}", daemon=True).start()

    def wait(self) -> Notice:
        """The next thing that happened."""
        while True:
            with suppress(queue.Empty):  # with a timeout, so that signals are handled meanwhile
                return self._notices.get(timeout=1.0)

    def cut(self, job: Job) -> None:
        """Has the job's workers save and return."""
        if stop := self._stops.get(job):
            stop.set()

    def stop(self) -> None:
        """The same of all jobs."""
        self._stopping = True
        for stop in list(self._stops.values()):
            stop.set()

    def _work(self, job: Job) -> None:
        def handle(found: Event) -> None:
            # and not before: it has to be there for the other worker groups, and its metrics for those who judge it
            if found["event"] == "shared" and job.trial.task.measured(found["record"]):
                self._notices.put(StageDone(job, found["record"]["key"], found["record"]))
            elif found["event"] == "trunk":
                key = trunk_key(found["trunk"], found["step"])
                self._notices.put(StageDone(job, key, {"key": key, "status": "trained"}))
            elif found["event"] == "evaluation":
                self._notices.put(Measured(job, found["stage"], found["step"], dict(found["metrics"])))
            self._show(job, found)

        ended = JobEnded(job)
        try:
            run = run_chain(job.trial.task, verbose=self._verbose, watch=Watch(handle, self._stops[job]))
            for record in run["stages"]:  # another driver may have trained some
                self._notices.put(StageDone(job, record["key"], record))
        except Interrupted:
            ended = JobEnded(job, stopped=True)
        except (RunFailed, InputError) as error:
            ended = JobEnded(job, str(error))
        except BaseException as error:  # whatever it is, the other trials go on
            ended = JobEnded(job, f"{type(error).__name__}: {error}")
        del self._stops[job]
        self._notices.put(ended)
