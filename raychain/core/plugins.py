"""Things that an experiment names: raychain's own, and those that installed packages add by Python's entry points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar, cast

T = TypeVar("T")


class Plugins(Mapping[str, T]):
    """By name; one of an installed package is imported when it is asked for.

    `own` gives raychain's own by name, which no package can replace: "module:attribute", or the thing itself. Asking
    for one of a package raises ValueError where it cannot be imported.
    """

    def __init__(self, group: str, own: Mapping[str, T | str]) -> None:
        self.group, self.own = group, own

    def __getitem__(self, name: str) -> T:
        found = self.own.get(name)
        if isinstance(found, str):
            return cast(T, EntryPoint(name, found, self.group).load())
        if found is not None:
            return found
        entry = _installed(self.group)[name]
        try:
            return cast(T, entry.load())
        except Exception as error:  # the package's own code runs here, which may raise anything
            raise ValueError(f"{name} ({entry.value}) cannot be imported: {type(error).__name__}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from sorted(_installed(self.group).keys() - self.own.keys())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in _installed(self.group)


@lru_cache
def _installed(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}
