"""All that a chain is measured on: its evaluators by name, and what the record of a stage says of each. Pure.

A record (`stage.json`) keeps what was measured by the digest of the held-out data, so an evaluator keeps its results
under another name, and one that is added later is measured alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from raychain.core.json import plain
from raychain.evaluators.config import Evaluate
from raychain.evaluators.data import RetrievalData, ZeroShotData
from raychain.evaluators.evaluator import HeldOut, Setting
from raychain.evaluators.metrics import Definition, define
from raychain.records import StageEntry, StageRecord

Results = dict[str, dict[str, float]]
"""Metrics by key, of each digest."""
FORMER = ("zero_shot", "retrieval")
"""The names, which were also the types, of the evaluators of raychain 0.1."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluator of a chain: its name, what it measures, and the data it has found."""

    name: str
    held_out: HeldOut
    definitions: tuple[Definition, ...]

    @property
    def digest(self) -> str:
        """Identity of the held-out data."""
        return self.held_out.digest

    def key(self, definition: Definition) -> str:
        """The metric's key within the evaluator."""
        return definition.name.removeprefix(f"{self.name}/")

    def named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The evaluator's metrics as runs name them: `imagenet/top1`, and the former names where there are such."""
        found = {d.name: metrics[self.key(d)] for d in self.definitions if self.key(d) in metrics}
        return found | {d.former: found[d.name] for d in self.definitions if d.former and d.name in found}

    def unnamed(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The evaluator's metrics by key, out of those of a record of raychain 0.1."""
        values = {self.key(d): d.value(metrics) for d in self.definitions}
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class Suite:
    """A chain's evaluators, in the order in which they are measured."""

    evaluations: tuple[Evaluation, ...] = ()

    @property
    def digest(self) -> str:
        """Identity of all that is measured."""
        former = [next((e.digest for e in self.evaluations if e.name == name), None) for name in FORMER]
        return _digest([*former, *sorted(e.digest for e in self.evaluations if e.name not in FORMER)])

    @property
    def samples(self) -> int:
        """Samples that a measurement reads."""
        return sum(e.held_out.samples for e in self.evaluations)

    @property
    def definitions(self) -> tuple[Definition, ...]:
        """Every metric."""
        return tuple(d for e in self.evaluations for d in e.definitions)

    def results(self, record: StageEntry) -> Results:
        """What a stage's record knows, of these evaluators and of others."""
        if record.evaluations is not None:
            return {
                digest: {name: value for name, value in entry.metrics.items() if value is not None}
                for digest, entry in record.evaluations.items()
            }
        return self._of_former(record)

    def missing(self, record: StageEntry) -> tuple[Evaluation, ...]:
        """The evaluators whose metrics a stage's record does not have."""
        known = self.results(record)
        return tuple(e for e in self.evaluations if e.digest not in known)

    def metrics(self, results: Results) -> dict[str, float]:
        """The metrics of these evaluators by name, as far as they are known."""
        found: dict[str, float] = {}
        for evaluation in self.evaluations:
            found |= evaluation.named(results.get(evaluation.digest, {}))
        return found

    def shown(self, record: StageRecord, **own: Any) -> StageEntry:
        """The stage as a run shows it: the metrics of these evaluators alone, under their names, and the run's `own`
        fields.
        """
        return record.entry(metrics=self.metrics(self.results(record)), **own)

    def recorded(self, record: StageRecord, results: Results) -> StageRecord:
        """The record of a stage of which this and nothing else is measured."""
        names = {e.digest: e.name for e in self.evaluations}
        held = {d: {"name": names[d], "metrics": found} if d in names else {"metrics": found}
                for d, found in results.items()}  # fmt: skip
        complete = all(e.digest in results for e in self.evaluations)
        measured = {"metrics": self.metrics(results), "evaluation": self.digest if complete else None,
                    "evaluations": held}  # fmt: skip
        return StageRecord.of(record.content() | plain(measured))

    def taken_over(self, record: StageRecord, began: float) -> str | None:
        """Today's digest of what a stage of schema 2 was measured on; None where that is other data, or was touched
        since `began`, in seconds since 1970.
        """
        same = [s for s in self._of_before if s.former == record.evaluation and s.changed <= began]
        return same[0].digest if same else None

    def _of_former(self, record: StageEntry) -> Results:
        """The results in a record of raychain 0.1, which names the digest of all that it had been measured on."""
        for measured in self._of_before if record.metrics else ():
            if record.evaluation == measured.digest:
                return {e.digest: e.unnamed(record.metrics or {}) for e in measured.evaluations}
        return {}

    @property
    def _of_before(self) -> list[Suite]:
        """What a record of raychain 0.1 may have been measured on: both of its sets, or one of them."""
        sets = [next((e for e in self.evaluations if e.name == name), None) for name in FORMER]
        chosen = [[e for e in (sets[i] for i in places) if e] for places in ((0, 1), (0,), (1,))]
        return [Suite(tuple(found)) for found in chosen if found]

    @property
    def former(self) -> str:
        """The digest that schema 2 would have had, where shards were told by probes."""
        sets = {e.name: e.held_out for e in self.evaluations}
        held = [sets.get(name) for name in FORMER]
        return _digest([found.former if isinstance(found, ZeroShotData | RetrievalData) else None for found in held])

    @property
    def changed(self) -> float:
        """When the last of the held-out shards was touched, seconds since 1970."""
        held = (e.held_out for e in self.evaluations)
        sets = [found for found in held if isinstance(found, ZeroShotData | RetrievalData)]
        return max((shard.changed for found in sets for shard in found.shards), default=0.0)


def resolve_suite(evaluate: Evaluate, setting: Setting) -> Suite:
    """Finds and checks all held-out data of an experiment. Raises InputError."""
    found = []
    for name, evaluator in evaluate.named.items():
        held_out = evaluator.resolve(f"evaluate.{name}", setting)
        found.append(Evaluation(name, held_out, define(name, evaluator.type, evaluator.metrics)))
    return Suite(tuple(found))


def _digest(value: Iterable[str | None]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]
