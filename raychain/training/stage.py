"""Consecutive stages in one worker: build, grow, resume, train, evaluate, export; the next is prepared meanwhile."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from raychain import records
from raychain.core.dist import rank, rank_slice, world_size
from raychain.core.finite import not_finite
from raychain.errors import Diverged
from raychain.evaluators.suite import Evaluation, Results
from raychain.feed.cache import ShardCache
from raychain.feed.health import Tally
from raychain.feed.loader import Loader
from raychain.feed.preload import first_windows
from raychain.feed.shards import Shard
from raychain.growth import Moments, grow, grow_moments, read_moments, write_moments
from raychain.paradigms.objective import Objective
from raychain.storage import Folder, patiently
from raychain.training.artifact import load_moments, write_artifact
from raychain.training.average import make_average
from raychain.training.control import Control, Wish
from raychain.training.loop import StageLoop
from raychain.training.measuring import free_node, measured, measured_apart
from raychain.training.optimizer import make_optimizer
from raychain.training.state import Counters, TrainState, all_finite
from raychain.training.states import Resumed, StageStates
from raychain.training.task import ChainTask, StageTask

STAGE_RECORD = "stage.json"
POLL_S = 0.2
"""How often the next stage looks whether its shards are there."""
HANDOVER_S = 1.0
"""How long a finished stage's files wait for the next stage's first step, which they would slow down."""


class Trained(NamedTuple):
    """A finished stage's model, and AdamW's moments at its end."""

    model: nn.Module
    moments: Moments | None


class ChainWorker:
    """One rank's run through the chain's unfinished stages."""

    def __init__(
        self,
        task: ChainTask,
        device: torch.device,
        emit: Callable[[dict[str, Any]], None],
        stopping: Callable[[], bool],
        *,
        preloading: bool = False,
        micro_batches: Mapping[int, int | None] | None = None,
        until: int | None = None,
    ) -> None:
        self.task, self.device, self.stopping = task, device, stopping
        self.rank = rank()
        self.emit = emit if self.rank == 0 else lambda _: None
        self.emit_from_any = emit
        self.experiment, self.paradigm = task.experiment, task.paradigm
        self.out = Folder(task.out)
        self.cache = ShardCache(self.experiment.preload.cache, self.experiment.preload.budget)
        self.control = Control()
        self.last_step: float | None = None
        self.stages = task.stages if until is None else task.stages[: until + 1]
        self.micro_batches = micro_batches or {}
        """Of each stage by index; absent or None: a worker's whole share at once."""
        self.preloading = preloading
        """Something on this node fetches the next stage's first shards: its loader starts when they are there."""
        self.hurry = threading.Event()
        """The next stage is due: its loader starts whether they are there or not."""
        self._background = ThreadPoolExecutor(2, thread_name_prefix="stage")
        self._ready: Future[tuple[nn.Module, Loader]] | None = None
        self._publishing: Future[None] | None = None
        self._handed_over = threading.Event()
        self._ending = threading.Event()
        """The group is to end: what is measured apart is waited for no longer."""
        self._running: tuple[StageTask, TrainState, Loader] | None = None

    @property
    def position(self) -> tuple[int, int, float] | None:
        """The stage that is trained, its steps done, and the seconds its loader has made the loop wait."""
        if self._running is None:
            return None
        stage, state, loader = self._running
        return stage.index, state.counters.step, loader.wait_s

    def holding(self) -> dict[str, int]:
        """The stage that is trained and how many pairs' activations this rank holds at once, at the most."""
        index = self._running[0].index if self._running else 0
        own = rank_slice(self.experiment.train.global_batch, self.rank, world_size())
        share = own.stop - own.start
        return {"stage": index, "micro_batch": min(self.micro_batches.get(index) or share, share)}

    def run(self) -> bool:
        """Trains every stage up to `until` that is not published; True when all are, False when it was stopped."""
        for stage in self.stages:
            self._measure_again(stage)
        previous: Trained | None = None
        todo = [stage for stage in self.stages if not self._published(stage)]
        try:
            for stage in todo:
                if stage.index and previous is None:
                    previous = self._load(self.task.stages[stage.index - 1])
                following = next((s for s in todo if s.index == stage.index + 1), None)
                ready, self._ready = self._ready, None
                states = StageStates(self.task, stage, self.emit)
                found = states.resumed(*self._agree(states.furthest() if self.rank == 0 else (0, 0)))
                if ready and found.step:  # states of an earlier time, or a shared trunk's: the loader begins there
                    ready.result()[1].close()
                    ready = None
                model, loader = ready.result() if ready else self._prepare(stage, found.step)
                with loader:
                    start = self._start(stage, model, found, previous)
                    previous = None  # its moments are needed no more
                    previous = self._train(stage, *start, loader, states, following)
                if previous is None:
                    return False
            self._wait_for_publication()
            for stage in todo:
                self._measure_again(stage)
            return True
        finally:
            self._ending.set()
            self.hurry.set()
            self._handed_over.set()
            if self._ready and not self._ready.cancel():
                with contextlib.suppress(Exception):
                    self._ready.result()[1].close()
            self._wait_for_publication()

    def _published(self, stage: StageTask) -> bool:
        record = records.read(self.out, f"stages/{stage.folder}/{STAGE_RECORD}", records.StageRecord, quiet=True)
        return self._agree(record is not None and record["key"] == stage.key)

    def _measure_again(self, stage: StageTask) -> None:
        """Measures a finished stage that has no metrics, or those of other held-out data."""
        name = f"stages/{stage.folder}/{STAGE_RECORD}"
        found = records.read(self.out, name, records.StageRecord, quiet=True) if self.rank == 0 else None
        record: dict[str, Any] | None = self._agree(found)
        if record is None or record["key"] != stage.key or self.task.measured(record):
            return
        missing = self.task.suite.missing(record)
        results = self.task.suite.results(record) | self._measure(stage, self._load(stage).model, stage.steps, missing)
        if self.rank == 0:
            record |= self.task.suite.recorded(results)
            self.out.write_json(name, record)
            shown = {key: value for key, value in record.items() if key != "files"}
            status = "reused" if stage.published else "trained"
            self.emit({"event": "stage_end", "stage": stage.index, "record": shown | {"status": status}})

    def _agree(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if world_size() == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def _load(self, stage: StageTask) -> Trained:
        """A finished stage. Raises FloatingPointError if it is not finite, as versions before checked none."""
        with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
            folder = self.out.fetch(f"stages/{stage.folder}", Path(scratch) / "stage")
            model, moments = self.paradigm.load(folder), load_moments(folder)
            if (problem := not_finite(model.state_dict())) is not None:
                raise FloatingPointError(f"stages/{stage.folder} cannot be gone on from: {problem}")
        found = list(model.state_dict().values())
        if moments:
            found += [*moments.exp_avg.values(), *moments.exp_avg_sq.values()]
        if not all_finite(found):
            shared = f" and store/{stage.key} in {self.task.store}" if self.task.store else ""
            raise FloatingPointError(
                f"{stage.model} is finished, but its weights or AdamW's moments are not finite. "
                f"Remove stages/{stage.folder} in {self.out.address}{shared} to train it again."
            )
        return Trained(model.to(self.device), moments)

    def _adapt(self, previous: Trained, stage: StageTask) -> Trained:
        """The stage before, for inputs of this stage's size. Interpolated position embeddings have no moments."""
        model = self.paradigm.adapt(previous.model, self.task.stages[stage.index - 1].config, stage.size)
        if model is previous.model or previous.moments is None:
            return Trained(model, previous.moments)
        step, *moments = previous.moments.step, previous.moments.exp_avg, previous.moments.exp_avg_sq
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        kept = [{name: value for name, value in m.items() if value.shape == shapes[name]} for m in moments]
        return Trained(model, Moments(step, *kept))

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
            threads=self.task.threads,
            pin=self.device.type == "cuda",
            report=self._report,
        )
        self._span("build " + stage.model, "build", started, stage)
        return model, loader

    def _prepare_early(self, stage: StageTask) -> tuple[nn.Module, Loader]:
        """`_prepare`, once the node's cache holds what the stage's loader begins with or the stage is due."""
        shards = first_windows(stage.feed)
        while not self.hurry.wait(POLL_S):
            if self.preloading and all(self.cache.touch(stage.feed.shards[s], stage.feed.reader) for s in shards):
                break
        return self._prepare(stage)

    def _start(
        self, stage: StageTask, model: nn.Module, resumed: Resumed, previous: Trained | None
    ) -> tuple[TrainState, Objective | None]:
        """The stage's state, grown from the stage before or restored, and its teacher."""
        transfer, recipe = self.experiment.transfer, self.experiment.train
        teacher, followed, describe = None, None, self.paradigm.describe
        model = model.to(self.device)
        if previous:
            previous, before = self._adapt(previous, stage), self.task.stages[stage.index - 1].config
            operators = {"width": transfer.width, "depth": transfer.depth}
            grow(previous.model, model, **operators, shrink=transfer.shrink, describe=describe)
            if transfer.distill:
                teacher = self.paradigm.objective(previous.model, before).to(self.device).eval().requires_grad_(False)
                followed = before
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed + stage.index)
            student = self.paradigm.objective(model, stage.config, followed).to(self.device)
        for tower in (student, teacher):
            if tower is not None:
                tower.micro_batch = self.micro_batches.get(stage.index)
        optimizer = make_optimizer(student, weight_decay=recipe.weight_decay, betas=stage.betas, eps=stage.eps)
        trained = previous is not None or stage.averaged_from > 0
        average = make_average(model, stage.average, trained=trained) if stage.average else None
        state = TrainState(student, optimizer, Counters(), average, stage.averaged_from)
        if resumed.step:
            resumed.states.load(resumed.step, state)
        elif previous and previous.moments and transfer.optimizer == "grow":
            grown = grow_moments(previous.model, model, previous.moments, **operators, describe=describe)
            write_moments(model, optimizer, grown)
        return state, teacher

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
            {
                "event": "stage_start",
                "stage": stage.index,
                "model": stage.model,
                "params": stage.params,
                "steps": stage.steps,
                "start_step": loader.start,
                "global_batch": self.experiment.train.global_batch,
                "epoch_samples": stage.epoch_samples,
                "world_size": world_size(),
                "cached_as": stage.feed.reader.kept,
            }
        )
        saved = [time.monotonic()]

        def wishes(step: int) -> Wish:
            self._handed_over.set()
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
                self.emit({"event": "stopped", "stage": stage.index, "step": state.counters.step})

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
        node = self._agree(free_node(self.task) if self.rank == 0 and following else None)
        measure = partial(self._measure_apart, stage, state.model, node)
        if node is None:
            results = self.evaluate(stage, state.model, state.counters.step)
            measure = partial(dict, results)
        moments = read_moments(state.student.model, state.optimizer)
        if self.rank == 0:
            self._wait_for_publication()
            # Nothing changes the stage's tensors any more, so the next one can train while they are written.
            self._handed_over.clear()
            self._publishing = self._background.submit(self._publish, stage, state, moments, measure, states)
        return Trained(state.model, moments)

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

    def evaluate(self, stage: StageTask, model: nn.Module, step: int) -> Results:
        """What the stage's model reaches after `step` steps; every rank calls it."""
        return self._measure(stage, model, step, self.task.suite.evaluations)

    def _measure(self, stage: StageTask, model: nn.Module, step: int, evaluations: Sequence[Evaluation]) -> Results:
        if not evaluations:
            return {}
        started = time.time()
        results = measured(stage, model, evaluations, self.cache, self.device)
        self._tell_metrics(stage, step, results, started)
        return results

    def _measure_apart(self, stage: StageTask, model: nn.Module, node: str) -> Results | None:
        """The metrics, from a process of its own beside the next stage's training; None: `_measure_again` has to."""
        started = time.time()
        results = measured_apart(self.task, stage, model, node, self._ending.is_set)
        if results is not None:
            self._tell_metrics(stage, stage.steps, results, started)
        return results

    def _tell_metrics(self, stage: StageTask, step: int, results: Results, started: float) -> None:
        metrics = self.task.suite.metrics(results)
        self.emit({"event": "evaluation", "stage": stage.index, "step": step, "metrics": metrics})
        self._span(f"evaluate {stage.model}", "evaluation", started, stage)

    def _publish(
        self,
        stage: StageTask,
        state: TrainState,
        moments: Moments,
        measure: Callable[[], Results | None],
        states: StageStates,
    ) -> None:
        self._handed_over.wait(HANDOVER_S)
        results = measure() or {}
        started, counters, transfer = time.time(), state.counters, self.experiment.transfer
        record = {
            "index": stage.index,
            "model": stage.model,
            "key": stage.key,
            "status": "trained",
            "epochs": stage.epochs,
            "steps": counters.step,
            "samples_seen": counters.samples,
            "params": stage.params,
            "macs": stage.macs,
            "wall_s": round(counters.wall_s, 3),
            "gap_s": None if counters.gap_s is None else round(counters.gap_s, 3),
            "data_wait_s": round(counters.data_wait_s, 3),
            "lr": stage.lr,
            "changes": [{"step": change.step, "lr": change.lr} for change in stage.changes],
            "transfer": transfer.model_dump(mode="json") if stage.index else None,
            "checkpoint": f"stages/{stage.folder}",
            **self.task.suite.recorded(results),
            "published": round(time.time(), 3),
        }
        with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
            files = write_artifact(
                Path(scratch),
                self.paradigm,
                state.model,
                stage.config,
                stage.size,
                projector=state.student.projector,
                moments=moments,
            )
            (Path(scratch) / STAGE_RECORD).write_text(json.dumps({**record, "files": files}, indent=2) + "\n")
            name = f"stages/{stage.folder}"
            patiently(lambda: self.out.publish(Path(scratch), name, STAGE_RECORD), f"{self.out.address}/{name}")
        states.clear()
        self._span(f"export {stage.model}", "export", started, stage)
        self.emit({"event": "stage_end", "stage": stage.index, "record": record})

    def _report(self, shard: Shard, bad: Tally) -> None:
        """Every rank tells of the shards it reads; the driver takes each once."""
        found = {"shard": shard.address, "identity": shard.identity, "bad": bad.as_dict()}
        self.emit_from_any({"event": "bad_samples", **found})

    def _span(self, name: str, category: str, start: float, stage: StageTask) -> None:
        self.emit(
            {
                "event": "span",
                "name": name,
                "category": category,
                "start": start,
                "end": time.time(),
                "stage": stage.index,
            }
        )
