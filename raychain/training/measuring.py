"""A stage's metrics: measured by its workers, or beside the training of the next steps from a copy of the weights."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import torch
from torch import nn

from raychain.core.priority import run_when_idle
from raychain.data.cache import ShardCache
from raychain.evaluators.context import Context
from raychain.evaluators.measure import measure
from raychain.evaluators.ranks import World
from raychain.evaluators.suite import Evaluation, Results
from raychain.paradigms.base import Paradigm
from raychain.training.task import StageTask

log = logging.getLogger("raychain.training")

MOST = 2
"""Models of an unfinished stage that may be held to be measured; with more, training waits for the next one."""
LAST_S = 20.0
"""How long measuring at the lowest priority is waited for when training is over: it has the core for itself then."""
ROOM = 6 * 2**30
"""Bytes that a GPU must have left for the activations of a batch, as at most a ViT-L needs them."""
POLL_S = 0.2


def measured(
    paradigm: Paradigm,
    stage: StageTask,
    model: nn.Module,
    evaluations: Iterable[Evaluation],
    cache: ShardCache,
    device: torch.device,
    world: World,
    progress: Callable[[int], None] = lambda _: None,
) -> Results:
    """The stage's model on what it is to be measured on; every rank of `world` calls it. `progress` as in Context."""
    tokenize = paradigm.tokenizer(stage.config)
    mean, std = paradigm.normalisation(model)
    context = Context(
        cache=cache,
        tokenize=tokenize,
        image_size=stage.size,
        resizing=paradigm.resizing(stage.config),
        mean=tuple(mean),
        std=tuple(std),
        device=device,
        world=world,
        progress=progress,
        words=paradigm.tokens(),
    )
    return {found.digest: measure(model, found.held_out, context) for found in evaluations}


class Place(Protocol):
    """Somewhere beside the training where a copy of a model is measured."""

    @property
    def patient(self) -> bool:
        """It is worth waiting for once training is over; if not, the workers do better to measure what is left."""

    @property
    def lost(self) -> bool:
        """Nothing can be measured there any more."""

    def copy(self, stage: StageTask, model: nn.Module) -> Any:
        """The model as it is now, for `measure`; training may change it meanwhile. None: it cannot be measured."""

    def measure(
        self, stage: StageTask, model: Any, evaluation: Evaluation, given_up: Callable[[], bool]
    ) -> dict[str, float] | None:
        """The metrics of a copy; None if that failed, or `given_up` while it was measured."""

    def release(self, model: Any) -> None:
        """The copy is needed no more."""


Done = Callable[[StageTask, int, Results, float], None]


class Beside:
    """Measures a stage's models one after the other, in a thread of rank 0's worker.

    `done` hears of each with the stage, its step, what was measured of it, and when that began.
    """

    def __init__(self, place: Place, done: Done) -> None:
        self._place, self._done = place, done
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="measure")
        self._jobs: list[Future[None]] = []
        self._closed = threading.Event()

    def has_room(self) -> bool:
        """Whether another model can be taken on while its stage goes on."""
        self._jobs = [job for job in self._jobs if not job.done()]
        return not self._place.lost and len(self._jobs) < MOST

    def submit(
        self, stage: StageTask, step: int, model: nn.Module, evaluations: Sequence[Evaluation], *, changing: bool
    ) -> None:
        """Measures the model as it is now, after `step` steps; returns at once, or once one that is `changing` is
        copied.
        """
        held = self._place.copy(stage, model) if changing and not self._place.lost else None
        if held is not None or not changing:
            self._jobs.append(self._pool.submit(self._run, stage, step, model, held, evaluations))

    def wait(self, seconds: float | None) -> None:
        """Waits for what was submitted, at most so long."""
        wait(self._jobs, seconds)

    def finish(self) -> None:
        """Training is over: waits as long as the place is worth it, then gives up the rest."""
        self.wait(None if self._place.patient else LAST_S)
        self.close()

    def close(self) -> None:
        """Gives up what is not measured yet."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, stage: StageTask, step: int, model: nn.Module, held: Any, evaluations: Sequence[Evaluation]) -> None:
        started, results = time.time(), {}
        if held is None and not self._place.lost and not self._closed.is_set():
            held = self._place.copy(stage, model)
        if held is None:
            return
        try:
            for evaluation in evaluations:
                found = self._place.measure(stage, held, evaluation, self._closed.is_set)
                if found is None:
                    break
                results[evaluation.digest] = found
        finally:
            self._place.release(held)
        if results:
            self._done(stage, step, results, started)


class _GivenUpError(Exception):
    """What is measured is wanted no more."""


class InThread:
    """Measures in a thread of the worker on the worker's device: on CPUs when nothing else wants the core, on a GPU in
    a stream of its own, which shares it with training's (no stream ranks below the one that training uses).

    It begins once `settled` says that training has taken the memory that it needs. Where a GPU has too little left
    then, nothing is measured here, and the workers do it when training is over.
    """

    def __init__(
        self, paradigm: Paradigm, cache: ShardCache, device: torch.device, settled: Callable[[], bool]
    ) -> None:
        self._paradigm, self._cache, self._device, self._settled = paradigm, cache, device, settled
        self.lost = False
        self.patient = device.type != "cpu"

    def copy(self, stage: StageTask, model: nn.Module) -> nn.Module | None:  # noqa: ARG002 - of the protocol
        """See Place."""
        try:
            return copy.deepcopy(model).eval().requires_grad_(False)
        except torch.OutOfMemoryError:
            self.lost = True
            return None

    def measure(
        self, stage: StageTask, model: nn.Module, evaluation: Evaluation, given_up: Callable[[], bool]
    ) -> dict[str, float] | None:
        """See Place."""
        while not self._settled() and not given_up():
            time.sleep(POLL_S)
        self.lost = self.lost or not self._has_room(model)
        if self.lost or given_up():
            return None

        def go_on(_: int) -> None:
            if given_up():
                raise _GivenUpError

        if self._device.type == "cpu":
            run_when_idle()
        what = (self._paradigm, stage, model, [evaluation], self._cache, self._device)
        try:
            with self._stream():
                return measured(*what, World(), go_on)[evaluation.digest]
        except _GivenUpError:
            pass
        except torch.OutOfMemoryError:
            self.lost = True
        except OSError as error:
            log.warning("%s will be measured again: %s", stage.model, error)
        return None

    def release(self, model: nn.Module) -> None:
        """See Place: the memory goes with the last reference."""

    def _stream(self) -> contextlib.AbstractContextManager[object]:
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.default_stream(self._device))
        return torch.cuda.stream(stream)

    def _has_room(self, model: nn.Module) -> bool:
        if self._device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self._device)
        return free > ROOM + sum(value.numel() * value.element_size() for value in model.parameters())
