"""Consecutive stages in one worker: build, grow, resume, train, evaluate, export; the next is prepared meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raychain.core.dist import neighbours, rank, rank_slice, world_size
from raychain.data.cache import ShardCache
from raychain.data.health import Tally
from raychain.data.loader import Loader
from raychain.data.preload import Ranks, Source, first_windows
from raychain.data.shards import Shard
from raychain.errors import Diverged
from raychain.evaluators.ranks import World
from raychain.evaluators.suite import Evaluation, Results
from raychain.events import BadSamples, Category, Evaluated, Event, Measured, Span, StageEnded, StageStarted, Stopped
from raychain.growth import Moments, read_moments
from raychain.paradigms.objective import Objective
from raychain.training.control import Control, Wish
from raychain.training.finished import FinishedStages, Trained
from raychain.training.loop import StageLoop
from raychain.training.measuring import Beside, measured
from raychain.training.start import start_stage
from raychain.training.state import TrainState
from raychain.training.states import StageStates
from raychain.training.task import ChainTask, StageTask

POLL_S = 0.2
"""How often the next stage looks whether its shards are there."""
SETTLED = 3
"""Steps after which a stage's training takes no more memory."""
STOP_S = 3.0
"""How long a stage that was stopped waits for what is being measured of it."""
HANDOVER_S = 1.0
"""How long a finished stage's files wait for the next stage's first step, which they would slow down."""


class ChainWorker:
    """One rank's run through the chain's unfinished stages."""

    def __init__(
        self,
        task: ChainTask,
        device: torch.device,
        emit: Callable[[Event], None],
        stopping: Callable[[], bool],
        *,
        preloading: bool = False,
        micro_batches: Mapping[int, int | None] | None = None,
        until: int | None = None,
        beside: bool = False,
        node: str = "",
    ) -> None:
        self.task, self.device, self.stopping = task, device, stopping
        self.rank = rank()
        self.node = neighbours(node, device) if node else (self.rank,)
        """The ranks that share this one's cache: those that give the same `node`."""
        self.emit = emit if self.rank == 0 else lambda _: None
        self.emit_from_any = emit
        self.experiment, self.paradigm = task.experiment, task.paradigm
        self.finished = FinishedStages(task)
        self.cache = ShardCache(self.experiment.preload.cache, self.experiment.preload.budget)
        self.control = Control()
        self.last_step: float | None = None
        self.stages = task.stages if until is None else task.stages[: until + 1]
        self.micro_batches = micro_batches or {}
        """Samples of a micro-batch by the stage's index; absent or None: a worker's whole share at once."""
        self.preloading = preloading
        """Something on this node fetches the next stage's first shards: its loader starts when they are there."""
        self.hurry = threading.Event()
        """The next stage is due: its loader starts whether they are there or not."""
        self._background = ThreadPoolExecutor(2, thread_name_prefix="stage")
        self._ready: Future[tuple[nn.Module, Loader]] | None = None
        self._publishing: Future[None] | None = None
        self._handed_over = threading.Event()
        self._published_as: dict[int, Future[None]] = {}
        """The publication of each stage that this worker has trained."""
        self.measures_beside = beside
        """Rank 0 has somewhere to measure finished stages while the next one trains."""
        self.beside: Beside | None = None
        """That place, on rank 0."""
        self.settled = threading.Event()
        """Training has made its first steps, and has the memory that it needs."""
        self._running: tuple[StageTask, TrainState, Loader] | None = None

    @property
    def position(self) -> tuple[int, int, float] | None:
        """The stage that is trained, its steps done, and the seconds its loader has made the loop wait."""
        if self._running is None:
            return None
        stage, state, loader = self._running
        return stage.index, state.counters.step, loader.wait_s

    def holding(self) -> tuple[int, int]:
        """The stage that is trained, by index, and of how many samples at most this rank holds activations at once."""
        index = self._running[0].index if self._running else 0
        own = rank_slice(self.experiment.train.global_batch, self.rank, world_size())
        share = own.stop - own.start
        return index, min(self.micro_batches.get(index) or share, share)

    def run(self) -> bool:
        """Trains every stage up to `until` that is not published; True when all are, False when it was stopped."""
        todo = [stage for stage in self.stages if not self._published(stage)]
        previous: Trained | None = None
        try:
            for stage in self.stages:
                if stage not in todo:
                    self._measure_missing(stage, beside=bool(todo))
            for stage in todo:
                before = self.task.before(stage)
                if before and (previous is None or stage.start):
                    previous = self.finished.load(before, self.device)
                following = next((s for s in todo if s.index == stage.index + 1), None)
                ready, self._ready = self._ready, None
                states = StageStates(self.task, stage, self.emit)
                found = states.resumed(*self._agree(states.furthest() if self.rank == 0 else (0, 0)))
                if ready and found.step:  # states of an earlier time, or a shared trunk's: the loader begins there
                    ready.result()[1].close()
                    ready = None
                model, loader = ready.result() if ready else self._prepare(stage, found.step)
                with loader:
                    start = start_stage(
                        self.task, stage, model.to(self.device), found, previous, self.micro_batches.get(stage.index)
                    )
                    previous = None  # its moments are needed no more
                    previous = self._train(stage, *start, loader, states, following)
                if previous is None:
                    return False
            self._wait_for_publication()
            if self.stages[-1].index + 1 == len(self.task.stages):  # else the next group measures what is missing
                self._finish_measuring()
            return True
        finally:
            self.settled.set()
            self.hurry.set()
            self._handed_over.set()
            if self._ready and not self._ready.cancel():
                with contextlib.suppress(Exception):
                    self._ready.result()[1].close()
            if self.beside:
                self.beside.close()
            self._wait_for_publication()

    def _published(self, stage: StageTask) -> bool:
        return self._agree(self.finished.record(stage) is not None)

    def _measure_missing(self, stage: StageTask, *, beside: bool) -> None:
        """Measures a finished stage by the evaluators of which its record has nothing; `beside` the training that
        follows, where there is a place for it.
        """
        record = self._agree(self.finished.record(stage) if self.rank == 0 else None)
        missing = self.task.suite.missing(record) if record else ()
        if not missing:
            return
        if not (beside and self.measures_beside):
            results = self.measure(stage, self.finished.load(stage, self.device).model, stage.steps, missing)
            self._add_results(stage, results)
        elif self.beside:
            self.beside.submit(
                stage, stage.steps, self.finished.load(stage, self.device).model, missing, changing=False
            )

    def _finish_measuring(self) -> None:
        """Has every stage measured, now that training is over."""
        self.settled.set()
        if self.beside:
            self.beside.finish()
        for stage in self.stages:
            self._measure_missing(stage, beside=False)

    def _add_results(self, stage: StageTask, results: Results) -> None:
        """Adds what was measured to the record of a finished stage."""
        record = self.finished.add(stage, results) if self.rank == 0 else None
        if record:
            self.emit(Measured(stage.index, record))

    def measured_beside(self, stage: StageTask, step: int, results: Results, started: float) -> None:
        """Takes what was measured beside the training."""
        self._tell_metrics(stage, step, results, started)
        if step == stage.steps:
            if publication := self._published_as.get(stage.index):
                publication.result()
            self._add_results(stage, results)

    def _agree(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if world_size() == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def _prepare(self, stage: StageTask, start: int = 0) -> tuple[nn.Module, Loader]:
        """The stage's fresh model and its started loader; runs beside the training of the stage before."""
        started = time.time()
        seed = self.experiment.train.seed + stage.index
        model = self.paradigm.build(stage.config, size=stage.size, seed=seed)
        loader = Loader(
            stage.feed,
            self.cache,
            global_batch=self.experiment.train.global_batch,
            start=start,
            stop=stage.steps,
            rank=self.rank,
            world=world_size(),
            node=self.node,
            threads=self.task.threads,
            pin=self.device.type == "cuda",
            report=self._report,
        )
        self._span("build " + stage.model, "build", started, stage)
        return model, loader

    def _prepare_early(self, stage: StageTask) -> tuple[nn.Module, Loader]:
        """`_prepare`, once the node's cache holds what the stage's loader begins with or the stage is due."""
        source = Source(stage.feed, self.experiment.train.global_batch)
        shards = first_windows(source, Ranks((self.rank,), world_size()))
        while not self.hurry.wait(POLL_S):
            if self.preloading and all(self.cache.touch(stage.feed.shards[s], stage.feed.reader) for s in shards):
                break
        return self._prepare(stage)

    def _train(
        self,
        stage: StageTask,
        state: TrainState,
        teacher: Objective | None,
        loader: Loader,
        states: StageStates,
        following: StageTask | None,
    ) -> Trained | None:
        """Runs the stage's steps, measures and publishes it; None if it was stopped. Raises Diverged."""
        started = time.time()
        self._running = (stage, state, loader)
        self.emit(
            StageStarted(
                stage=stage.index,
                model=stage.model,
                params=stage.params,
                steps=stage.steps,
                start_step=loader.start,
                global_batch=self.experiment.train.global_batch,
                epoch_samples=stage.epoch_samples,
                world_size=world_size(),
                cached_as=stage.feed.reader.kept,
            )
        )
        saved = [time.monotonic()]

        def wishes(step: int) -> Wish:
            self._handed_over.set()
            if step >= loader.start + SETTLED:
                self.settled.set()
            every = self.experiment.checkpoint.every
            due = step % every.amount == 0 if every.unit == "steps" else time.monotonic() - saved[0] >= every.amount
            saved[0] = time.monotonic() if due else saved[0]
            if self._publishing and self._publishing.done():
                self._wait_for_publication()
            stop, fail = Wish.STOP if self.stopping() else Wish.NONE, Wish.FAIL if states.broken else Wish.NONE
            return stop | fail | (Wish.SAVE if due else Wish.NONE)

        def save(last: bool) -> None:
            begun = time.time()
            if self.rank == 0:
                states.save(state, last=last)
                self._span(f"checkpoint {state.counters.step}", "checkpoint", begun, stage)
            if last and not states.broken:
                if self.beside:
                    self.beside.wait(STOP_S)
                self.emit(Stopped(stage.index, state.counters.step))

        def share() -> None:
            if self.rank == 0:
                states.share(state)

        loop = StageLoop(
            stage,
            self.experiment.train,
            self.experiment.transfer.distill,
            self.device,
            world_size(),
            self.emit,
            wishes,
            save,
            share,
            lambda: self.evaluate(stage, state.model, state.counters.step),
        )
        self.hurry.clear()
        self._ready = self._background.submit(self._prepare_early, following) if following else None
        try:
            complete = loop.run(state, teacher, loader, self.control, self.last_step)
            if self._agree(states.broken or (complete and self.rank == 0 and not state.finite())):
                raise loop.not_finite(state)
        except FloatingPointError as error:
            raise self._diverged(stage, states, loop, error) from None
        self.last_step = time.time()
        if not complete:
            states.finish()
        self.hurry.set()
        self._span(stage.model, "stage", started, stage)
        if not complete:
            return None
        # Nothing changes the stage's tensors any more, so the next one can train while they are written and measured.
        moments = read_moments(state.student.model, state.optimizer)
        if self.rank == 0:
            self._wait_for_publication()
            self.settled.clear()
            if following:
                self._handed_over.clear()
            self._publishing = self._background.submit(self._publish, stage, state, moments, states)
            self._published_as[stage.index] = self._publishing
        self._measure_finished(stage, state.model, following)
        return Trained(state.model, moments)

    def _measure_finished(self, stage: StageTask, model: nn.Module, following: StageTask | None) -> None:
        """Measures a stage at its end: beside the next one if the chain goes on, else by all ranks."""
        evaluations = self.task.suite.evaluations
        if self.measures_beside and stage.index + 1 < len(self.task.stages):
            if self.beside and following:  # else the next group measures it
                self.beside.submit(stage, stage.steps, model, evaluations, changing=False)
        elif results := self.measure(stage, model, stage.steps, evaluations):
            if self._publishing:
                self._publishing.result()
            self._add_results(stage, results)

    def _diverged(self, stage: StageTask, states: StageStates, loop: StageLoop, error: FloatingPointError) -> Diverged:
        """The error, with the last state from which the loss was finite; every rank calls it."""
        step = 0
        if self.rank == 0:
            states.finish()
            step, _ = states.furthest(int(loop.sound) - 1)
        step = self._agree(step)
        kept = (
            f"The last good state is that of step {step}."
            if step
            else "No good state was saved: the stage begins again."
        )
        return Diverged(f"{error} {kept}", stage.index, step)

    def _wait_for_publication(self) -> None:
        """Raises what kept the stage before from being published."""
        publishing, self._publishing = self._publishing, None
        if publishing:
            publishing.result()

    def evaluate(self, stage: StageTask, model: nn.Module, step: int) -> None:
        """Measures the stage's model after `step` steps, beside the training if possible; every rank calls it."""
        evaluations = self.task.suite.evaluations
        if self.measures_beside and self._agree(self.beside is not None and self.beside.has_room()):
            if self.beside:
                self.beside.submit(stage, step, model, evaluations, changing=True)
        else:
            self.measure(stage, model, step, evaluations)

    def measure(self, stage: StageTask, model: nn.Module, step: int, evaluations: Sequence[Evaluation]) -> Results:
        """What the stage's model reaches after `step` steps; every rank calls it."""
        if not evaluations:
            return {}
        started = time.time()
        results = measured(self.paradigm, stage, model, evaluations, self.cache, self.device, World.group())
        self._tell_metrics(stage, step, results, started)
        return results

    def _tell_metrics(self, stage: StageTask, step: int, results: Results, started: float) -> None:
        self.emit(Evaluated(stage.index, step, self.task.suite.metrics(results)))
        self._span(f"evaluate {stage.model}", "evaluation", started, stage)

    def _publish(self, stage: StageTask, state: TrainState, moments: Moments, states: StageStates) -> None:
        self._handed_over.wait(HANDOVER_S)
        started = time.time()
        record = self.finished.publish(stage, state, moments)
        states.clear()
        self._span(f"export {stage.model}", "export", started, stage)
        self.emit(StageEnded(stage.index, record))

    def _report(self, shard: Shard, bad: Tally) -> None:
        """Every rank tells of the shards it reads; the driver takes each once."""
        self.emit_from_any(BadSamples(shard.address, shard.identity, bad))

    def _span(self, name: str, category: Category, start: float, stage: StageTask) -> None:
        self.emit(Span(name, category, start, time.time(), stage.index))
