"""Trains a search's paths of stages on Ray: a worker group and a thread each, as `raychain run` would."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress

from raychain.backend_ray import cluster
from raychain.errors import InputError, Interrupted, RunFailed
from raychain.events import Evaluated, Listener, Listeners, Shared, TrunkShared
from raychain.records import StageEntry
from raychain.runs.driver import Watch, run_chain
from raychain.searching.campaign import Job, JobEnded, Measured, Notice, StageDone, trunk_key
from raychain.searching.request import Plan
from raychain.training.task import worker_cpus


class _Notices(Listener):
    """Turns what happens in a job into notices for who judges the trials."""

    def __init__(self, job: Job, notices: queue.Queue[Notice]) -> None:
        self._job, self._notices = job, notices

    def shared(self, event: Shared) -> None:
        # and not before: it has to be there for the other worker groups, and its metrics for those who judge it
        if self._job.trial.task.measured(event.record):
            self._notices.put(StageDone(self._job, event.record.key, event.record))

    def trunk_shared(self, event: TrunkShared) -> None:
        key = trunk_key(event.trunk, event.step)
        self._notices.put(StageDone(self._job, key, StageEntry(key=key, status="trained")))

    def evaluated(self, event: Evaluated) -> None:
        self._notices.put(Measured(self._job, event.stage, event.step, dict(event.metrics)))


class RayRunner:
    """Runs jobs on the Ray cluster this process is connected to. `show` gives what shows a job's events."""

    def __init__(self, show: Callable[[Job], Listener], *, verbose: bool = False) -> None:
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
        watch = Watch(Listeners([_Notices(job, self._notices), self._show(job)]), self._stops[job])
        ended = JobEnded(job)
        try:
            run = run_chain(job.trial.task, verbose=self._verbose, watch=watch)
            for record in run.stages or ():  # another driver may have trained some
                self._notices.put(StageDone(job, record.key, record))
        except Interrupted:
            ended = JobEnded(job, stopped=True)
        except (RunFailed, InputError) as error:
            ended = JobEnded(job, str(error))
        except BaseException as error:  # whatever it is, the other trials go on
            ended = JobEnded(job, f"{type(error).__name__}: {error}")
        del self._stops[job]
        self._notices.put(ended)


def slots(plan: Plan) -> int:
    """Worker groups at once: what the cluster holds of them, or what the user wants if that is less."""
    compute = plan.experiment.compute
    worker = {"CPU": float(worker_cpus(plan.experiment))} | (
        {"GPU": float(compute.gpus_per_worker)} if compute.gpus_per_worker else {}
    )
    room = max(1, cluster.capacity(worker) // plan.experiment.most_workers)
    return min(room, plan.search.concurrent or room)
