"""What is tried next: any searcher of Tune's, asked for a chain that is new when a worker group needs one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ray.tune.search import Searcher, SearchGenerator

from raychain.core.json import Json
from raychain.searching.book import Book
from raychain.searching.choices import Choices
from raychain.searching.controls import checks, controls, equal_macs
from raychain.searching.judging import Rungs
from raychain.searching.space import Params
from raychain.searching.trials import Kind, Trial
from raychain.searching.tune.desk import Desk
from raychain.searching.tune.live import DamagedStateError, Live

TRIES = 50
"""Choices that are asked of a searcher for one new affordable chain, before the space is walked through."""
PATIENCE_S = 0.9
"""How long is waited for the need of a trial while there is no other; Tune would look again after a second."""
LATER: tuple[tuple[Kind, Callable[..., Iterator[Params]]], ...] = (("equal-macs", equal_macs), ("full", checks))
"""What follows when all chosen chains are over."""


class ChainSearch(Searcher):
    """Asks `searcher`, the attribute that Tune saves and restores by itself, as with its own ConcurrencyLimiter.

    Suggestions that are known already, too expensive, or begin with stages behind which chains were stopped, are
    answered without a trial.
    """

    def __init__(self, searcher: Searcher, book: Book, desk: Desk, *, rungs: Rungs | None, most_open: int,
                 seeds: Sequence[Params] = ()) -> None:  # fmt: skip
        super().__init__(metric=searcher.metric, mode=searcher.mode)
        self.searcher = searcher
        self._book, self._desk, self._rungs, self._most_open = book, desk, rungs, most_open
        self._choices, self._seeds = Choices.of_space(book.plan.space), list(seeds)
        self.first: list[Params] = []
        """Chains to begin with that the searcher cannot be told."""
        self._later, self._controls = iter(LATER), False
        self._walk: Iterator[Params] | None = None
        self._promised: Trial | None = None
        self._numbers: dict[str, int] = {}
        """Open trials by Tune's name."""
        self._names: dict[int, list[str]] = {}
        """What `searcher` calls an open trial: once for each time that it has suggested it."""

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        """The searcher has its own already."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next trial's configuration; None: not yet."""
        book, desk = self._book, self._desk
        waits = self._promised is not None and self._promised.number not in book.trials
        if waits or desk.alive >= self._most_open or not desk.needs_more(0.0 if book.open else PATIENCE_S):
            return None
        trial = self._next(trial_id)
        if trial is None:
            return None if book.open else Searcher.FINISHED
        self._promised = trial
        self._numbers[trial_id] = trial.number
        return {"number": trial.number, "kind": trial.kind, **trial.params}

    def _next(self, trial_id: str) -> Trial | None:
        book = self._book
        if not self._controls:  # not before Tune's own trials are known
            self._controls = True
            for params in controls(book.plan):
                book.propose("control", params)
            for params in self.first:
                book.propose("planned" if params in self._seeds else "sampled", params)
        while True:
            while book.proposals:
                if trial := book.draft(*book.proposals.popleft()):
                    return trial
            if book.given < book.plan.search.trials and (trial := self._chosen(trial_id)):
                return trial
            if book.open or (later := next(self._later, None)) is None:
                return None
            kind, phase = later
            for params in phase(book.plan, book.tasks, list(book.trials.values())):
                book.propose(kind, params)

    def _chosen(self, trial_id: str) -> Trial | None:
        for count in range(TRIES):
            name = f"{trial_id}.{count}"
            values: Any = self.searcher.suggest(name)
            if values is None and self._book.open:
                return None  # it waits for results
            if values is None or values == Searcher.FINISHED:
                break
            params = self._choices.decode(values)
            trial = self._new(params) if params else None
            known = self._book.seen.get(trial.name) if trial else None
            if trial is None or (self._rungs and self._rungs.ended(trial.keys) and not self._book.was_stopped(trial)):
                self.searcher.on_trial_complete(name)  # pruned: of an error it would learn nothing
            elif known is None:
                self._names[trial.number] = [name]
                return trial
            elif known.status == "running":
                self._names.setdefault(known.number, []).append(name)
            else:
                self.searcher.on_trial_complete(name, self._result(known))
        self._walk = self._walk or self._choices.points()
        for params in self._walk:
            trial = self._new(params)
            if trial and trial.name not in self._book.seen and not (self._rungs and self._rungs.ended(trial.keys)):
                return trial
        return None

    def _new(self, params: Params) -> Trial | None:
        space = self._book.plan.space
        kind: Kind = "planned" if params in self._seeds else "sampled"
        return self._book.draft(kind, params) if space.affordable(params) else None

    def _result(self, trial: Trial) -> Json | None:
        """What a chain that is over has reached, for a suggestion that is the same; None: it has no value."""
        if trial.status != "succeeded":
            return None
        metric = self._book.plan.metric
        return {metric.recorded: metric.value(trial.metrics), "macs": float(trial.macs), "training_iteration": 1}

    def on_trial_result(self, trial_id: str, result: Json) -> None:
        """A measurement on the way."""
        for name in self._called(trial_id):
            self.searcher.on_trial_result(name, result)

    def on_trial_complete(self, trial_id: str, result: Json | None = None, error: bool = False) -> None:
        """Only a whole chain's metric is its value; one that was stopped is pruned."""
        whole = result if result and result.get("complete") else None
        for name in self._called(trial_id):
            self.searcher.on_trial_complete(name, result=whole, error=error)
        self._names.pop(self._numbers.pop(trial_id, -1), None)

    def on_pause(self, trial_id: str) -> None:
        """The scheduler lets it wait."""
        self._pass_on("on_pause", trial_id)

    def on_unpause(self, trial_id: str) -> None:
        """It goes on."""
        self._pass_on("on_unpause", trial_id)

    def _pass_on(self, what: str, trial_id: str) -> None:
        for name in self._called(trial_id) if hasattr(self.searcher, what) else ():
            getattr(self.searcher, what)(name)

    def _called(self, trial_id: str) -> Sequence[str]:
        return self._names.get(self._numbers.get(trial_id, -1), ())

    def get_state(self) -> Json:
        """What is saved beside the searcher's own state."""
        return {"numbers": dict(self._numbers), "names": {number: list(names) for number, names in self._names.items()}}

    def set_state(self, state: Json) -> None:
        """Goes on from there."""
        self._numbers, self._names = dict(state["numbers"]), dict(state["names"])

    def save(self, checkpoint_path: str) -> None:
        """The searcher's own state."""
        self.searcher.save(checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        """The searcher's own state."""
        self.searcher.restore(checkpoint_path)


class ChainGenerator(Live, SearchGenerator):
    """Tune's, except that a search that was finished goes on where more trials are wanted, and that Tune cannot begin
    anew without a word where it could not restore a search.
    """

    def __init__(self, searcher: ChainSearch, *, restored: bool) -> None:
        super().__init__(searcher)
        self._restored = restored

    def add_configurations(self, experiments: Any) -> None:
        """Called for a new search alone. Raises DamagedStateError for one that goes on."""
        if self._restored:
            raise DamagedStateError("Tune could not restore its state (--verbose shows why)")
        super().add_configurations(experiments)

    def set_state(self, state: Json) -> None:
        super().set_state(state | {"finished": False})
