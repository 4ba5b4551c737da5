"""One tar file as it was surveyed, and how its samples are counted: here, or wherever `counted_by` has it done."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import BinaryIO, Protocol

from raychain.core.storage import is_command, is_local
from raychain.data import health
from raychain.data.content import ChangedError, Hashed, former_identity, hash_of, identify, opened
from raychain.data.fetch import READ_AHEAD, open_input
from raychain.data.health import Bad, Tally
from raychain.data.index import DECLARED, READ
from raychain.data.members import Format

WHOLE_AHEAD = 2**23
"""Bytes asked of object storage at once where the whole shard is read."""


@dataclass(frozen=True)
class Shard:
    """One tar file, as it was when it was surveyed."""

    address: str
    size: int
    identity: str
    """Tells its content, so a copy that was moved is the same shard and a changed byte makes another."""
    samples: int
    bad: Tally = field(default_factory=Tally, compare=False)
    """What is not among `samples`, as far as the members' names tell."""
    version: str = field(default="", compare=False)
    """The version, as in `Content.version`."""
    changed: float = field(default=math.inf, compare=False)
    """When the file was last touched, seconds since 1970."""
    former: str = field(default="", compare=False)
    """The identity that schema 2 gave it; empty where it was not read."""
    source: str = field(default=READ, compare=False)
    """Where the count comes from, one of `index.SOURCES`."""

    @property
    def declared(self) -> bool:
        """Whether nobody has counted: the count is what a file beside the shard says, and may be wrong."""
        return self.source in DECLARED


class Elsewhere(Protocol):
    """Counts shards on other machines too."""

    @property
    def width(self) -> int:
        """How many it counts at once."""

    def count(self, shard: Shard, wanted: Format, hashed: bool) -> Shard | None:
        """What `counted` gives; None where this machine has to count."""


_elsewhere: ContextVar[Elsewhere | None] = ContextVar("elsewhere", default=None)


@contextlib.contextmanager
def counted_by(elsewhere: Elsewhere) -> Iterator[None]:
    """Surveys inside have shards counted there."""
    token = _elsewhere.set(elsewhere)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def elsewhere() -> Elsewhere | None:
    """What counts on other machines, if something does."""
    return _elsewhere.get()


def counted(shard: Shard, wanted: Format, hashed: bool) -> Shard:
    """The shard with its count, read whole, and with what was not known of it yet: a command's content, and that of a
    local file without an identity, which must look as `version` says. With `hashed` a hash of the content takes the
    place of the identity, which becomes the version. Raises OSError.
    """
    if is_command(shard.address):
        with open_input(shard.address) as printed:
            identity, size = hash_of(printed)
            found = _names(printed, wanted)
            former = former_identity(printed, size)
        return replace(shard, identity=identity, size=size, samples=found[0], bad=found[1], former=former, source=READ)
    if is_local(shard.address) and not shard.identity:
        content = identify(shard.address)
        if content.version != shard.version:
            raise ChangedError(f"{shard.address} is another file here")
        shard = replace(shard, identity=content.identity, changed=content.changed)
    with opened(shard, WHOLE_AHEAD if hashed else READ_AHEAD) as file:
        if hashed:
            passed = Hashed(file, shard.size)
            found = _names(io.BufferedReader(passed), wanted)
            shard = replace(shard, version=shard.identity, identity=passed.hexdigest())
            former = former_identity(file, shard.size)
        else:
            former = former_identity(file, shard.size)
            file.seek(0)
            found = _names(file, wanted)
    return replace(shard, samples=found[0], bad=found[1], former=former, source=READ)


def _names(file: BinaryIO, wanted: Format) -> tuple[int, Tally]:
    """How many samples an open file has, and what cannot be used, by its members' names."""
    found: list[Bad] = []
    samples = sum(1 for _ in wanted.samples(file, found.append, names_only=True))
    return samples, health.tally(found)
