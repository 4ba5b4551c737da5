"""Where a run stands as Prometheus metrics, which Ray's exporter on the driver's node serves (`ray_raychain_…`)."""

from __future__ import annotations

import contextlib

from ray.util.metrics import Counter, Gauge

from raychain.events import Evaluated, Event, Listener, Restarted, StageStarted, Step

TAGS = ("run", "model")


class Gauges(Listener):
    """Turns events into metrics; needs a connection to Ray. `run` tells runs of one cluster apart."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run, "model": ""}
        self._models: dict[int, str] = {}
        self._images = Gauge("raychain_images_per_second", "Images a second, all workers together.", TAGS)
        self._tokens = Gauge("raychain_tokens_per_second", "Tokens a second of language models, all workers.", TAGS)
        self._wait = Counter("raychain_data_wait_seconds", "Time the training loop has waited for data.", TAGS)
        self._loss = Gauge("raychain_loss", "Loss of the last logged step, distillation included.", TAGS)
        self._steps = Gauge("raychain_step", "Optimiser steps done of the stage.", TAGS)
        self._stage = Gauge("raychain_stage", "Index of the stage that trains, from 0.", TAGS)
        self._workers = Gauge("raychain_workers", "Workers of the group that trains.", TAGS)
        self._metric = Gauge("raychain_metric", "What was measured last on held-out data.", (*TAGS, "metric"))
        self._restarts = Counter("raychain_restarts", "Worker groups that ended early.", (*TAGS, "reason"))

    def dispatch(self, event: Event) -> None:
        """Takes one event. Raises nothing."""
        with contextlib.suppress(Exception):  # a number for a dashboard is no reason to lose a run
            super().dispatch(event)

    def stage_started(self, event: StageStarted) -> None:
        """Sets the model, the stage, its step and the number of workers."""
        self._tags["model"] = self._models[event.stage] = event.model
        self._stage.set(event.stage, self._tags)
        self._steps.set(event.start_step, self._tags)
        self._workers.set(event.world_size, self._tags)

    def step(self, event: Step) -> None:
        """Sets speed, loss and step, and adds the time waited for data."""
        rate, unit = event.rate
        (self._images if unit == "images/s" else self._tokens).set(rate, self._tags)
        self._loss.set(event.loss, self._tags)
        self._steps.set(event.step, self._tags)
        if event.data_wait_s > 0:  # a counter takes no zero
            self._wait.inc(event.data_wait_s, self._tags)

    def evaluated(self, event: Evaluated) -> None:
        """Sets the metrics."""
        for name, value in event.metrics.items():
            if value is not None:
                model = self._models.get(event.stage, "")
                self._metric.set(value, {**self._tags, "model": model, "metric": name})

    def restarted(self, event: Restarted) -> None:
        """Counts the restart; no worker trains until the next group begins."""
        self._workers.set(0, self._tags)
        self._restarts.inc(1, {**self._tags, "reason": event.reason})
