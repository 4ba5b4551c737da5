"""Ray Tune's interfaces, implemented elsewhere: nothing here knows raychain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher


class Climb(Searcher):
    """Takes the last of every dimension, then goes down one dimension after the other, from the best point so far."""

    def __init__(self, metric: str | None = None, mode: str | None = None, start: int = 0) -> None:
        super().__init__(metric=metric, mode=mode)
        self.start, self.asked = start, 0
        self.open: dict[str, dict[str, Any]] = {}
        self.best: tuple[float, dict[str, Any]] | None = None

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        self.choices = {name: getattr(domain, "categories", None) or list(range(domain.lower, domain.upper))
                        for name, domain in config.items()}  # fmt: skip
        return True

    def suggest(self, trial_id: str) -> dict[str, Any]:
        point = dict(self.best[1]) if self.best else {name: values[-1] for name, values in self.choices.items()}
        name = list(point)[(self.start + self.asked) % len(point)]
        values = self.choices[name]
        point[name] = values[values.index(point[name]) - 1] if self.asked else point[name]
        self.asked += 1
        self.open[trial_id] = point
        return point

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        point = self.open.pop(trial_id)
        if result and (self.best is None or result[self.metric] > self.best[0]):
            self.best = result[self.metric], point

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text(json.dumps([self.asked, self.open, self.best]))

    def restore(self, checkpoint_path: str) -> None:
        self.asked, self.open, best = json.loads(Path(checkpoint_path).read_text())
        self.best = tuple(best) if best else None


class Floor(FIFOScheduler):
    """Stops what has less than `least` after its first stage."""

    def __init__(self, metric: str, least: float) -> None:
        super().__init__()
        self._metric, self.least = metric, least

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self.STOP if result["whole"] and result[self._metric] < self.least else self.CONTINUE


class Enough(Stopper):
    """Ends everything as soon as a chain has so much."""

    def __init__(self, metric: str, most: float) -> None:
        self.metric, self.most, self.reached = metric, most, False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self.reached = self.reached or result[self.metric] >= self.most
        return False

    def stop_all(self) -> bool:
        return self.reached


class Diary(Callback):
    """Writes down every result."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        with Path(self.file).open("a") as diary:
            diary.write(f"{result['config']['number']} {result['stage']} {result['complete']}\n")
