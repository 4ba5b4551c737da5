"""raychain's training loop and another one in turns, a step each, so that both meet the same machine."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from raychain.config.loading import opened, validate
from raychain.events import Event, Step
from raychain.runs.resolve import make_task
from raychain.training.stage import ChainWorker

WARM = 10


def in_turns(tree: dict[str, Any], step: Callable[[], None]) -> tuple[float, float]:
    """Seconds of a step of raychain's for the experiment `tree`, and of `step`: medians without the first ten.

    Seconds are the processor's: of `step` those of its thread, of raychain's step all others of the process, its
    loader's too. Every step is logged.
    """
    ours: list[float] = []
    theirs: list[float] = []
    last = 0.0

    def emit(event: Event) -> None:
        nonlocal last
        if isinstance(event, Step):
            ours.append(time.process_time() - last)
            begun, last = time.thread_time(), time.process_time()
            step()
            theirs.append(time.thread_time() - begun)
            last += theirs[-1]

    with tempfile.TemporaryDirectory() as scratch:
        own = {
            "name": "speed",
            "compute": {"cpus_per_worker": 1},
            "preload": {"cache": f"{scratch}/cache"},
            "train": tree["train"] | {"average": None, "precision": "fp32", "log_every": 1},
        }
        task = make_task(opened(validate(tree | own)), f"{scratch}/out")
        ChainWorker(task, torch.device("cpu"), emit, lambda: False).run()
    return statistics.median(ours[WARM:]), statistics.median(theirs[WARM:])
