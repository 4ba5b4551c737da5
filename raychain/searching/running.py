"""Trains a search's paths of stages on Ray: a worker group and a thread each, as `raychain run` would."""

from __future__ import annotations

import queue
import threading

from raychain.backend_ray import cluster
from raychain.errors import InputError, Interrupted, RunFailed
from raychain.events import Evaluated, Listener, Listeners, Shared, TrunkShared
from raychain.records import StageEntry
from raychain.reporting.search_progress import SearchProgress
from raychain.runs.driver import Watch, run_chain
from raychain.searching.campaign import Job, JobEnded, Measured, Notice, StageDone, Trained
from raychain.searching.reports import Measure
from raychain.searching.request import Plan
from raychain.searching.trials import trunk_key
from raychain.training.task import worker_cpus


class _Notices(Listener):
    """Turns what happens in a job into notices for who judges the trials."""

    def __init__(self, job: Job, notices: queue.SimpleQueue[Notice]) -> None:
        self._job, self._notices = job, notices

    def shared(self, event: Shared) -> None:
        if event.record.status == "trained":  # it may be cut before it is measured
            self._notices.put(Trained(self._job, event.record.key))
        # and not before: it has to be there for the other worker groups, and its metrics for those who judge it
        if self._job.trial.task.measured(event.record):
            self._notices.put(StageDone(self._job, event.record.key, event.record))

    def trunk_shared(self, event: TrunkShared) -> None:
        key = trunk_key(event.trunk, event.step)
        self._notices.put(StageDone(self._job, key, StageEntry(key=key, status="trained")))

    def evaluated(self, event: Evaluated) -> None:
        self._notices.put(Measured(self._job, event.stage, Measure(event.step, dict(event.metrics))))


class RayRunner:
    """Runs jobs on the Ray cluster this process is connected to."""

    def __init__(self, plan: Plan, progress: SearchProgress, *, verbose: bool = False) -> None:
        self._plan, self._progress, self._verbose = plan, progress, verbose
        self._notices: queue.SimpleQueue[Notice] = queue.SimpleQueue()
        self._stops: dict[Job, threading.Event] = {}
        self._stopping = False

    def start(self, job: Job) -> None:
        """Begins; returns at once."""
        _take_over(self._plan, job)
        self._progress.begin(job)
        self._stops[job] = threading.Event()
        if self._stopping:  # by a signal meanwhile
            self._stops[job].set()
        threading.Thread(target=self._work, args=(job,), name=f"trial {job.trial.number}", daemon=True).start()

    def wait(self) -> Notice:
        """The next thing that happened."""
        return self._notices.get()

    def put(self, notice: Notice) -> None:
        """Has `wait` return this; also in handlers of signals."""
        self._notices.put(notice)

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
        watch = Watch(Listeners([_Notices(job, self._notices), self._progress.of(job)]), self._stops[job])
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


def _take_over(plan: Plan, job: Job) -> None:
    """The chain's folder of an earlier version, which has what is left of its stages."""
    last = job.trial.task.stages[-1]
    folder, former = f"chains/{last.key[:12]}", f"chains/{last.former.key[:12]}"
    if not plan.out.exists(folder) and plan.out.exists(former):
        plan.out.move(former, folder)


def slots(plan: Plan) -> int:
    """Worker groups at once: what the cluster holds of them, or what the user wants if that is less."""
    compute = plan.experiment.compute
    worker = {"CPU": float(worker_cpus(plan.experiment))} | (
        {"GPU": float(compute.gpus_per_worker)} if compute.gpus_per_worker else {}
    )
    room = max(1, cluster.capacity(worker) // plan.experiment.most_workers)
    return min(room, plan.search.concurrent or room)
