"""What of the training data cannot be used, over all shards, stages and ranks: `data_health` of run.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from raychain.data.health import Tally, kinds
from raychain.data.shards import Shard
from raychain.events import BadSamples, Listener
from raychain.records import HealthRecord, RunRecord

LISTED = 20
"""Shards with bad samples that are listed in a message and as examples; run.json counts all."""


class DataHealth(Listener):
    """Adds what the workers find when they decode to what the survey found; each shard counts once.

    `limit` is the share of samples that may be bad. `earlier` is the run.json of an earlier call on the same run
    folder: a continued run may read no shard again whose findings stand there.
    """

    def __init__(self, shards: Sequence[Shard], limit: float, earlier: RunRecord | None = None) -> None:
        self.limit = limit
        self._shards = {shard.identity: shard for shard in shards}
        self._decoded: dict[str, Tally] = {}
        noted = earlier.data_health if earlier else None
        for identity, found in ((noted and noted.decoded) or {}).items():
            self._add(identity, Tally.of(found))

    def bad_samples(self, event: BadSamples) -> None:
        """Counts what was found in a shard, if that is one of the run's."""
        self._add(event.identity, event.bad)

    def _add(self, identity: str, bad: Tally) -> None:
        if identity in self._shards:
            self._decoded.setdefault(identity, bad)

    @property
    def bad(self) -> dict[str, int]:
        """Kind → how many."""
        counts: Counter[str] = Counter()
        for shard in self._shards.values():
            counts.update(shard.bad.counts)
        for found in self._decoded.values():
            counts.update(found.counts)
        return dict(sorted(counts.items()))

    @property
    def samples(self) -> int:
        """Samples in the shards, bad ones included."""
        return sum(shard.samples + shard.bad.total for shard in self._shards.values())

    @property
    def exceeded(self) -> bool:
        """Whether more is bad than `limit` allows."""
        return sum(self.bad.values()) > self.limit * self.samples

    def describe(self) -> str:
        """In words: how many are bad, and where; one line, as `RunFailed` and `InputError` show it."""
        bad = self.bad
        total, listed = sum(bad.values()), self._listed()
        where = "; ".join(f"{shard.address}: {', '.join(map(str, found.examples))}" for shard, found in listed[:LISTED])
        more = f"; and {len(listed) - LISTED:,} more shards" if len(listed) > LISTED else ""
        share = f"{total:,} of {self.samples:,} samples ({total / max(self.samples, 1):.2%})"
        return f"{share} cannot be used, data.max_bad_fraction is {self.limit:g} ({kinds(bad)}). {where}{more}"

    def record(self) -> HealthRecord:
        """`data_health` of run.json. `decoded` keeps, by shard identity, what only decoding could find."""
        examples = [
            {"shard": shard.address, "key": bad.key, "kind": bad.kind, "detail": bad.detail}
            for shard, found in self._listed()[:LISTED]
            for bad in found.examples
        ]
        return HealthRecord(
            shards=len(self._shards),
            samples=self.samples,
            bad=self.bad,
            examples=examples,
            decoded={identity: found.record() for identity, found in self._decoded.items()},
        )

    def _listed(self) -> list[tuple[Shard, Tally]]:
        """Every finding with its shard, in the order of the shards."""
        pairs = [(s, t) for s in self._shards.values() for t in (s.bad, self._decoded.get(s.identity, Tally()))]
        return [(shard, found) for shard, found in pairs if found]
