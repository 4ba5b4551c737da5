"""Consecutive stages in one worker: build, grow, resume, train, evaluate, export; the next is prepared meanwhile."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from raychain.evaluation.measure import evaluate
from raychain.families import build, model_config
from raychain.families.tokenizing import make_tokenizer
from raychain.feed.cache import ShardCache
from raychain.feed.loader import Feed, Loader
from raychain.feed.members import Wanted
from raychain.feed.spec import Spec, fitting
from raychain.growth import Moments, grow, grow_moments, read_moments, write_moments
from raychain.objectives.contrastive import world_size
from raychain.objectives.distillation import Projector
from raychain.storage import Folder
from raychain.training.artifact import load_model, load_moments, write_artifact
from raychain.training.checkpoint import Checkpoints
from raychain.training.control import Control, Wish
from raychain.training.loop import StageLoop
from raychain.training.optimizer import make_optimizer
from raychain.training.state import Counters, TrainState
from raychain.training.student import Student, preprocessing_of
from raychain.training.task import ChainTask, StageTask

STAGE_RECORD = "stage.json"


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
    ) -> None:
        self.task, self.device, self.stopping = task, device, stopping
        self.rank = dist.get_rank() if world_size() > 1 else 0
        self.emit = emit if self.rank == 0 else lambda _: None
        self.experiment = task.experiment
        self.out = Folder(task.out)
        self.cache = ShardCache(self.experiment.preload.cache, self.experiment.preload.budget)
        self.control = Control()
        self.prepare = ThreadPoolExecutor(1, thread_name_prefix="next-stage")
        self.last_step: float | None = None

    def run(self) -> bool:
        """Trains every stage that is not published; True when the chain is complete, False when it was stopped."""
        teacher: Trained | None = None
        ready: Future[tuple[nn.Module, Loader]] | None = None
        todo = [stage for stage in self.task.stages if not self._published(stage)]
        for stage in todo:
            if stage.index and teacher is None:
                teacher = self._load(self.task.stages[stage.index - 1])
            following = next((s for s in todo if s.index == stage.index + 1), None)
            model, loader = ready.result() if ready else self._prepare(stage, self._resume_step(stage))
            ready = None
            with loader:
                student, ready = self._train(stage, model, loader, teacher, following)
            if student is None:
                if ready:
                    ready.result()[1].close()
                return False
            teacher = student
        return True

    def _published(self, stage: StageTask) -> bool:
        record = self.out.read_json(f"stages/{stage.folder}/{STAGE_RECORD}")
        return self._agree(isinstance(record, dict) and record.get("key") == stage.key)

    def _resume_step(self, stage: StageTask) -> int:
        return int(self._agree(Checkpoints(self.out, stage.folder, stage.key, 1).latest() or 0))

    def _agree(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if world_size() == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def _load(self, stage: StageTask) -> Trained:
        with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
            folder = self.out.fetch(f"stages/{stage.folder}", Path(scratch) / "stage")
            return Trained(load_model(folder).to(self.device), load_moments(folder))

    def _prepare(self, stage: StageTask, start: int = 0) -> tuple[nn.Module, Loader]:
        """The stage's fresh model and its started loader; runs beside the training of the stage before."""
        started = time.time()
        model = build(stage.model, seed=self.experiment.train.seed + stage.index, image_size=stage.image_size)
        tokenize, tokenizer = make_tokenizer(model_config(stage.model))
        data = self.experiment.data
        spec = Spec(Wanted(data.captions.keys), stage.image_size, tokenizer, data.crop is not None)
        spec = fitting(spec, self.task.order.samples, self.experiment.preload.budget)
        feed = Feed(self.task.shards, self.task.order, spec, data.captions.per_image, data.crop)
        loader = Loader(
            feed,
            self.cache,
            tokenize,
            global_batch=self.experiment.train.global_batch,
            start=start,
            stop=stage.steps,
            rank=self.rank,
            world=world_size(),
            threads=self.task.threads,
            pin=self.device.type == "cuda",
        )
        self._span("build " + stage.model, "build", started, stage)
        return model, loader

    def _train(
        self,
        stage: StageTask,
        model: nn.Module,
        loader: Loader,
        previous: Trained | None,
        following: StageTask | None,
    ) -> tuple[Trained | None, Future[tuple[nn.Module, Loader]] | None]:
        transfer, recipe, started = self.experiment.transfer, self.experiment.train, time.time()
        teacher, projector = None, None
        model = model.to(self.device)
        if previous:
            grow(previous.model, model, width=transfer.width, depth=transfer.depth)
            if transfer.distill:
                teacher = Student(previous.model).to(self.device).eval().requires_grad_(False)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(recipe.seed + stage.index)
                    projector = Projector(_embed_dim(stage.model), _embed_dim(self.task.stages[stage.index - 1].model))
        student = Student(model, projector).to(self.device)
        optimizer = make_optimizer(student, weight_decay=recipe.weight_decay, betas=stage.betas, eps=stage.eps)
        state = TrainState(student, optimizer, Counters())
        if previous and previous.moments and transfer.optimizer == "grow" and not loader.start:
            operators = {"width": transfer.width, "depth": transfer.depth}
            write_moments(model, optimizer, grow_moments(previous.model, model, previous.moments, **operators))
        checkpoints = Checkpoints(self.out, stage.folder, stage.key, self.experiment.checkpoint.keep)
        if loader.start:
            checkpoints.load(loader.start, state)
        self.emit(
            {
                "event": "stage_start",
                "stage": stage.index,
                "model": stage.model,
                "params": stage.params,
                "steps": stage.steps,
                "start_step": loader.start,
                "global_batch": recipe.global_batch,
                "epoch_samples": self.task.epoch_samples,
                "world_size": world_size(),
            }
        )
        saved = [time.monotonic()]

        def wishes(step: int) -> Wish:
            every = self.experiment.checkpoint.every
            due = step % every.amount == 0 if every.unit == "steps" else time.monotonic() - saved[0] >= every.amount
            saved[0] = time.monotonic() if due else saved[0]
            return (Wish.STOP if self.stopping() else Wish.NONE) | (Wish.SAVE if due else Wish.NONE)

        def save() -> None:
            begun = time.time()
            if self.rank == 0:
                checkpoints.save(state, wait=self.stopping())
                self._span(f"checkpoint {state.counters.step}", "checkpoint", begun, stage)

        loop = StageLoop(
            stage,
            recipe,
            transfer.distill,
            self.device,
            world_size(),
            self.emit,
            wishes,
            save,
            lambda: self.evaluate(stage, model, state.counters.step),
        )
        ready = self.prepare.submit(self._prepare, following) if following else None
        complete = loop.run(state, teacher, loader, self.control, self.last_step)
        self.last_step = time.time()
        self._span(stage.model, "stage", started, stage)
        if not complete:
            return None, ready
        metrics = self.evaluate(stage, model, state.counters.step)
        moments = read_moments(model, optimizer)
        if self.rank == 0:
            self._publish(stage, state, moments, metrics)
            checkpoints.clear()
        if world_size() > 1:
            dist.barrier()
        return Trained(model, moments), ready

    def evaluate(self, stage: StageTask, model: nn.Module, step: int) -> dict[str, float]:
        """The metrics of the stage's model after `step` steps; every rank calls it."""
        if self.task.zero_shot is None and self.task.retrieval is None:
            return {}
        started = time.time()
        tokenize, tokenizer = make_tokenizer(model_config(stage.model))
        preprocessing = preprocessing_of(model)
        metrics = evaluate(
            model,
            zero_shot=self.task.zero_shot,
            retrieval=self.task.retrieval,
            cache=self.cache,
            tokenize=tokenize,
            image_size=stage.image_size,
            mean=preprocessing["mean"],
            std=preprocessing["std"],
            tokenizer_id=tokenizer,
            device=self.device,
        )
        self.emit({"event": "evaluation", "stage": stage.index, "step": step, "metrics": metrics})
        self._span(f"evaluate {stage.model}", "evaluation", started, stage)
        return metrics

    def _publish(self, stage: StageTask, state: TrainState, moments: Moments, metrics: dict[str, float]) -> None:
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
            "transfer": transfer.model_dump(mode="json") if stage.index else None,
            "checkpoint": f"stages/{stage.folder}",
            "metrics": metrics,
            "evaluation": self.task.evaluation,
        }
        with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
            files = write_artifact(
                Path(scratch),
                state.student.model,
                model_config(stage.model),
                stage.image_size,
                projector=state.student.projector,
                moments=moments,
            )
            (Path(scratch) / STAGE_RECORD).write_text(json.dumps({**record, "files": files}, indent=2) + "\n")
            self.out.publish(Path(scratch), f"stages/{stage.folder}", STAGE_RECORD)
        self._span(f"export {stage.model}", "export", started, stage)
        self.emit({"event": "stage_end", "stage": stage.index, "record": record})

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


def _embed_dim(name: str) -> int:
    return int(model_config(name)["embed_dim"])
