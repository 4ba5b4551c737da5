"""The training loop of one stage. One rank's view; collectives join the ranks where there are several."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raychain.config.experiment import Distill, Train
from raychain.core.dist import mean_over_ranks, rank, world_size
from raychain.data.loader import Loader
from raychain.data.order import mix
from raychain.events import Event, Step
from raychain.paradigms.objective import Columns, Objective
from raychain.training.control import Control, Wish
from raychain.training.optimizer import learning_rate
from raychain.training.state import TrainState
from raychain.training.step import Losses, forward_backward
from raychain.training.task import StageTask


@dataclass
class StageLoop:
    """Runs the steps of a stage that are left."""

    task: StageTask
    recipe: Train
    distill: Distill | None
    device: torch.device
    world: int
    emit: Callable[[Event], None]
    wishes: Callable[[int], Wish]
    """Rank 0's wishes after a step."""
    save: Callable[[bool], None]
    """Saves the state; True: it is the last thing the stage does here."""
    share: Callable[[], None]
    """Shares the trunk's state with stages of other lengths."""
    evaluate: Callable[[], object]
    sound: torch.Tensor = field(init=False)
    """Steps done with a finite loss; on the device, read only when training has failed."""

    def run(
        self, state: TrainState, teacher: Objective | None, loader: Loader, control: Control, last_step: float | None
    ) -> bool:
        """Trains until the stage's last step; False if it was stopped before (the state is saved then).

        `last_step` is when the previous stage's last step ended, in wall-clock seconds, if it ended in this process.
        Raises FloatingPointError, naming the step, when a logged loss is not finite, or a state that was to be saved.
        """
        counters, started = state.counters, time.perf_counter()
        self.sound = torch.tensor(counters.step, device=self.device)
        student: nn.Module = state.student.train()
        if world_size() > 1:
            student = DistributedDataParallel(
                student,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
            )
        if self.task.eval_every and self.task.index and not counters.step:
            self.evaluate()
        base, logged = (counters.wall_s, counters.data_wait_s), (time.perf_counter(), counters.samples, 0.0)
        for batch in loader:
            lr = learning_rate(
                counters.step,
                peak=self.task.peak(counters.step),
                warmup=self.task.warmup,
                total=self.task.steps,
                schedule=self.recipe.schedule,
                cooldown=self.task.cooldown,
            )
            begun = time.time()
            losses = self._update(student, state, teacher, batch.to(self.device), lr)
            self.sound += losses.total.isfinite()
            if counters.gap_s is None and last_step is not None:
                counters.gap_s, counters.first_step_s = begun - last_step, time.time() - begun
            counters.step += 1
            state.follow()
            counters.samples += self.recipe.global_batch
            counters.wall_s = base[0] + time.perf_counter() - started
            counters.data_wait_s = base[1] + loader.wait_s
            done = counters.step == self.task.steps
            if counters.step % self.recipe.log_every == 0 or done:
                self._log(state, losses, lr, loader, logged)
                logged = (time.perf_counter(), counters.samples, loader.wait_s)
            if counters.step in self.task.rungs:
                self.share()
            wish = control.exchange(lambda: self.wishes(counters.step))
            if wish & Wish.FAIL:
                raise self.not_finite(state)
            if wish & Wish.STOP and not done:
                self.save(True)
                return False
            if wish & Wish.SAVE and not done:
                self.save(False)
            if self.task.eval_every and counters.step % self.task.eval_every == 0 and not done:
                self.evaluate()
        return True

    def not_finite(self, state: TrainState) -> FloatingPointError:
        """The error for a state that is not to be saved or published."""
        found = "weights, AdamW's moments or averaged weights are not finite"
        return FloatingPointError(f"{self.task.model}: {found} at step {state.counters.step}.")

    def _update(
        self, student: nn.Module, state: TrainState, teacher: Objective | None, batch: Columns, lr: float
    ) -> Losses:
        self._seed(int(mix(self.recipe.seed, self.task.index, state.counters.step, rank())))
        distill = self.task.distilled(state.counters.step, self.distill)
        followed = teacher if distill else None
        losses = forward_backward(
            student, state.student, followed, batch, distill, self.recipe.global_batch, self._forward
        )
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(state.student.parameters(), self.recipe.clip_norm)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.optimizer.step()
        state.optimizer.zero_grad()
        with torch.no_grad():
            state.student.after_step()
        return losses

    def _seed(self, seed: int) -> None:
        """Dropout's random numbers depend on the step and rank alone, so that a resumed stage draws the same.

        `torch.manual_seed` does this for all kinds of devices, which takes half a millisecond where there is no GPU.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _forward(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.task.precision == "bf16")

    def _log(
        self, state: TrainState, losses: Losses, lr: float, loader: Loader, logged: tuple[float, int, float]
    ) -> None:
        task, distill, alpha = mean_over_ranks(torch.stack([losses.task, losses.distill, losses.alpha])).tolist()
        counters = state.counters
        if not math.isfinite(task + distill):
            raise FloatingPointError(
                f"{self.task.model}: the loss is not finite at step {counters.step} (task {task}, distill {distill})."
            )
        since, samples, waited = logged
        self.emit(
            Step(
                stage=self.task.index,
                step=counters.step,
                samples=counters.samples,
                epoch=round(counters.step / self.task.steps * self.task.epochs, 4),
                loss=task + distill,
                task_loss=task,
                distill_loss=distill,
                alpha=alpha,
                lr=lr,
                report=state.student.report(),
                samples_per_s=round((counters.samples - samples) / (time.perf_counter() - since), 1),
                sample_tokens=self.task.tokens,
                data_wait_s=round(loader.wait_s - waited, 4),
                world_size=self.world,
            )
        )
