"""Where trials wait for their stages, and the trial itself: Ray Tune's trainable, which trains nothing.

A trial is a light process without CPUs that asks the board for what is known of its chain and reports it to Tune.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raychain.core.json import Json
from raychain.errors import RunFailed

POLL_S = 30.0
"""A trial asks again at least so often, so that it does not wait for a lost answer."""
WAITING = 10_000
"""Trials that can wait at once."""
PING_S, ANSWER_S = 2.0, 30.0
"""How often the board is asked whether it is there, and how long it may take to answer."""
POSITION = "stage.json"
"""What a trial's checkpoint holds: which report it made last."""
OVER, DONE = "over", "done"
Reports = Sequence[Json]


class TrialFailedError(Exception):
    """A stage of the trial's chain cannot be trained."""


class Board:
    """The actor: keeps the reports of every trial that is not over. Ray gives an async actor's calls no order, so
    reports carry their number."""

    def __init__(self) -> None:
        self._reports: defaultdict[int, dict[int, Json]] = defaultdict(dict)
        self._ends: dict[int, tuple[int, str]] = {}
        self._news: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self._turns: defaultdict[int, int] = defaultdict(int)
        """How often each was let go."""
        self._released = False

    async def ping(self) -> None:
        """Returns, if the board is there."""

    async def post(self, trial: int, first: int, reports: Reports, end: str | None) -> None:
        """Reports, of which the first has this number; with `end` none follow them."""
        self._reports[trial].update(enumerate(reports, first))
        if end:
            self._ends[trial] = first + len(reports), end
        self._news[trial].set()

    async def follow(self, trial: int, after: int) -> tuple[Reports, str | None]:
        """The reports from number `after` on, as soon as there is one; and how it ended, if these are its last."""
        news, turn = self._news[trial], self._turns[trial]
        news.clear()
        found, end = self._look(trial, after)
        if not found and not end:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(news.wait(), POLL_S)
            found, end = self._look(trial, after) if self._turns[trial] == turn else ([], OVER)
        return found, end

    async def forget(self, trial: int, for_good: bool) -> None:
        """It is over (`for_good`), or waits for others and is asked for again; its process is let go."""
        self._turns[trial] += 1
        if for_good:
            self._reports.pop(trial, None)
            self._ends[trial] = 0, OVER
        self._news[trial].set()

    async def release(self) -> None:
        """Lets every trial go that waits: the search was interrupted, and Tune has left its loop."""
        self._released = True
        for news in self._news.values():
            news.set()

    def _look(self, trial: int, after: int) -> tuple[Reports, str | None]:
        known = self._reports[trial]
        found: list[Json] = []
        while after + len(found) in known:
            found.append(known[after + len(found)])
        last, end = self._ends.get(trial, (0, None))
        if self._released and not found:
            return [], "the search was interrupted"
        return found, end if after + len(found) >= last else None


class Waiting:
    """The board, and the trials that wait at it, as the search's driver has them."""

    def __init__(self) -> None:
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(Board)
        self._board = actor.options(num_cpus=0, max_concurrency=WAITING, scheduling_strategy=node).remote()
        self._ping, self._pinged = self._board.ping.remote(), time.monotonic()
        self.trainable = make_trial(self._board)

    def post(self, trial: int, first: int, reports: Reports, end: str | None) -> None:
        """What a trial is to report, from which number on, and how it ended, if it did."""
        self._board.post.remote(trial, first, reports, end)

    def forget(self, trial: int, *, for_good: bool) -> None:
        """Lets a trial's process go."""
        self._board.forget.remote(trial, for_good)

    def release(self) -> None:
        """Lets all go."""
        self._board.release.remote()

    def check(self) -> None:
        """Raises RunFailed where the board is gone; asks it every PING_S at most."""
        if time.monotonic() - self._pinged < PING_S:
            return
        try:
            ray.get(self._ping, timeout=ANSWER_S)
        except ray.exceptions.RayError as error:
            raise RunFailed(f"the search's board is gone: {error}") from error
        self._ping, self._pinged = self._board.ping.remote(), time.monotonic()

    def close(self) -> None:
        """Ends the board."""
        ray.kill(self._board)


def make_trial(board: Any) -> Callable[[Json], None]:
    """The trainable, for `tune.Tuner` and `Tuner.restore`, which compares its name."""

    def chain(config: Json) -> None:
        told = (-1, 0)
        if last := tune.get_checkpoint():
            with last.as_directory() as folder:
                told = tuple(json.loads((Path(folder) / POSITION).read_text())["place"])
        known, end = 0, None
        while end is None:
            reports, end = ray.get(board.follow.remote(config["number"], known))
            known += len(reports)
            for report in reports:
                place = report["stage"], report["step"]
                if place <= told:
                    continue
                if not report["whole"]:
                    tune.report(report)
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    (Path(folder) / POSITION).write_text(json.dumps({"place": place, "key": report["key"]}))
                    tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))
        if end not in (DONE, OVER):
            raise TrialFailedError(end)

    # Tune refuses {"CPU": 0}; a ten-thousandth of this node's own resource holds nothing that stages need.
    return tune.with_resources(chain, {f"node:{ray.util.get_node_ip_address()}": 0.0001})
