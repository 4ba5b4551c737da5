"""Where a run stands as Prometheus metrics, which Ray's exporter on the driver's node serves (`ray_raychain_…`)."""

from __future__ import annotations

import contextlib

from ray.util.metrics import Counter, Gauge

from raychain.reporting.events import Event

TAGS = ("run", "model")


class Gauges:
    """Turns events into metrics; needs a connection to Ray. `run` tells runs of one cluster apart."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run, "model": ""}
        self._models: dict[int, str] = {}
        self._images = Gauge("raychain_images_per_second", "Images a second, all workers together.", TAGS)
        self._wait = Counter("raychain_data_wait_seconds", "Time the training loop has waited for data.", TAGS)
        self._loss = Gauge("raychain_loss", "Loss of the last logged step, distillation included.", TAGS)
        self._step = Gauge("raychain_step", "Optimiser steps done of the stage.", TAGS)
        self._stage = Gauge("raychain_stage", "Index of the stage that trains, from 0.", TAGS)
        self._workers = Gauge("raychain_workers", "Workers of the group that trains.", TAGS)
        self._metric = Gauge("raychain_metric", "What was measured last on held-out data.", (*TAGS, "metric"))
        self._restarts = Counter("raychain_restarts", "Worker groups that ended early.", (*TAGS, "reason"))

    def handle(self, event: Event) -> None:
        """Takes one event; kinds that say nothing here are ignored."""
        with contextlib.suppress(Exception):  # a number for a dashboard is no reason to lose a run
            self._handle(event)

    def _handle(self, event: Event) -> None:
        match event["event"]:
            case "stage_start":
                self._tags["model"] = self._models[event["stage"]] = event["model"]
                self._stage.set(event["stage"], self._tags)
                self._step.set(event["start_step"], self._tags)
                self._workers.set(event["world_size"], self._tags)
            case "step":
                self._images.set(event["samples_per_s"], self._tags)
                self._loss.set(event["loss"], self._tags)
                self._step.set(event["step"], self._tags)
                if event["data_wait_s"] > 0:  # a counter takes no zero
                    self._wait.inc(event["data_wait_s"], self._tags)
            case "evaluation":
                for name, value in event["metrics"].items():
                    if value is not None:
                        model = self._models.get(event["stage"], "")
                        self._metric.set(value, {**self._tags, "model": model, "metric": name})
            case "restart":
                self._workers.set(0, self._tags)
                self._restarts.inc(1, {**self._tags, "reason": event["reason"]})
