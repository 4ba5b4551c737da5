"""Trains a search's paths of stages on Ray: a worker group and a thread each, as `raychain run` would."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from raychain.chain.driver import Watch, run_chain
from raychain.errors import InputError, Interrupted, RunFailed
from raychain.reporting.events import Event
from raychain.searching.campaign import Job, JobEnded, StageDone, trunk_key

ShowEvent = Callable[[Job, Event], None]


class RayRunner:
    """Runs jobs on the Ray cluster this process is connected to. `show` gets (job, event) of all of them."""

    def __init__(self, show: ShowEvent, *, verbose: bool = False) -> None:
        self._show, self._verbose = show, verbose
        self._notices: queue.Queue[StageDone | JobEnded | None] = queue.Queue()
        self._stop = threading.Event()

    def start(self, job: Job) -> None:
        """Begins; returns at once."""
        threading.Thread(target=self._work, args=(job,), name=f"trial {job.trial.number}", daemon=True).start()

    def wait(self) -> StageDone | JobEnded:
        """The next thing that happened."""
        while True:
            try:  # with a timeout, so that signals are handled meanwhile
                if (notice := self._notices.get(timeout=1.0)) is not None:
                    return notice
            except queue.Empty:
                continue

    def stop(self) -> None:
        """Has all workers save and return."""
        self._stop.set()

    def _work(self, job: Job) -> None:
        def handle(found: Event) -> None:
            if found["event"] == "shared":  # and not before: it has to be there for the other worker groups
                self._notices.put(StageDone(job, found["record"]["key"], found["record"]))
            elif found["event"] == "trunk":
                key = trunk_key(found["trunk"], found["step"])
                self._notices.put(StageDone(job, key, {"key": key, "status": "trained"}))
            self._show(job, found)

        ended = JobEnded(job)
        try:
            run = run_chain(job.trial.task, verbose=self._verbose, watch=Watch(handle, self._stop))
            for record in run["stages"]:  # another driver may have trained some
                self._notices.put(StageDone(job, record["key"], record))
        except Interrupted:
            ended = JobEnded(job, stopped=True)
        except (RunFailed, InputError) as error:
            ended = JobEnded(job, str(error))
        except BaseException as error:  # whatever it is, the other trials go on
            ended = JobEnded(job, f"{type(error).__name__}: {error}")
        self._notices.put(ended)
