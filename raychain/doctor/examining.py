"""All that is looked at, in the order in which a person would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from raychain.backend_ray.address import cluster as named_cluster
from raychain.config.experiment import Preload
from raychain.doctor import machine, places
from raychain.doctor.finding import Finding, looked_at

ALWAYS: dict[str, Callable[[], Finding]] = {
    "python": machine.python,
    "ray": machine.ray,
    "torch": machine.torch,
    "gpu": machine.gpus,
    "cpu": machine.cpus,
    "memory": machine.memory,
    machine.SHARED: machine.shared_memory,
    "temporary": machine.temporary,
    "files": machine.files,
    "ports": machine.ports,
    "token": machine.token,
    "optional": machine.optional,
}


def examine(storage: str | None = None, address: str | None = None, cache: str | None = None) -> Iterator[Finding]:
    """One finding after the other; what cannot be looked at is a problem and no error.

    `address` is looked at where it is given or RAY_ADDRESS is set, `storage` where it is given.
    """
    looks = dict(ALWAYS) | {"cache": partial(machine.cache, cache or Preload().cache)}
    if storage is not None:
        looks["storage"] = partial(places.storage, storage)
    looks["cluster"] = partial(_cluster, address)
    yield from (looked_at(name, look) for name, look in looks.items())


def _cluster(address: str | None) -> Finding:
    found = named_cluster(address)
    if found is None:
        return Finding(
            "cluster", "ok", "none given: runs start Ray on this machine (--address or RAY_ADDRESS joins one)"
        )
    return places.cluster(found)
