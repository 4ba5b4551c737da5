"""The one place where raychain reaches into Ray's private modules.

Each import stands inside the function that needs it, which does something safe where a version of Ray has moved what it
needs: the next best through Ray's public functions, or nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import ray

from raychain.core.json import Json

log = logging.getLogger("raychain.backend_ray")

_told: set[str] = set()


def missing(what: str, error: BaseException) -> None:
    """Says once a process that this version of Ray does not offer something, and why."""
    if what not in _told:
        _told.add(what)
        log.warning("Ray %s does not give raychain %s: %s", ray.__version__, what, error)


class Requests(Protocol):
    """Requests for workers to the cluster's autoscaler."""

    def ask(self, workers: int, running: int, *, again: bool) -> None:
        """Asks for so many workers beside those `running`; `again`: as the last time."""

    def cancel(self) -> None:
        """Takes the request back."""


def requests(name: str, worker: Mapping[str, float]) -> Requests:
    """What asks the autoscaler for workers of these resources, as `name`.

    Ray has no public way to ask beside others: `ray.autoscaler.sdk.request_resources` replaces what anybody asked for
    before, and a placement group would keep what it gets from those who could use it now. Its own libraries share a
    coordinator, which adds up their requests.
    """
    try:
        return Coordinated(name, worker)
    except (ImportError, AttributeError, TypeError) as error:
        missing("its coordinator of requests to the autoscaler; what other jobs ask for may be forgotten", error)
        return Alone(worker)


class Coordinated:
    """Through the coordinator of Ray's own libraries."""

    def __init__(self, name: str, worker: Mapping[str, float]) -> None:
        from ray.train import ScalingConfig
        from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
            TrainAutoscalingCoordinatorClient,
        )

        self._client: Any = TrainAutoscalingCoordinatorClient(name)
        self._send, self._repeat = self._client.send_resource_request, self._client.maybe_send_resource_request
        self._config = ScalingConfig(num_workers=1, use_gpu=worker.get("GPU", 0) > 0, resources_per_worker=dict(worker))

    def ask(self, workers: int, running: int, *, again: bool) -> None:  # noqa: ARG002 - Ray Train asks for those itself
        (self._repeat if again else self._send)(self._config, workers)

    def cancel(self) -> None:
        self._client.cancel_resource_request()


class Alone:
    """Through Ray's public function, whose last caller is the only one that is heard."""

    def __init__(self, worker: Mapping[str, float]) -> None:
        self._worker = dict(worker)

    def ask(self, workers: int, running: int, *, again: bool) -> None:
        if not again:
            self._request([self._worker] * (workers + running))

    def cancel(self) -> None:
        self._request([])

    def _request(self, bundles: list[dict[str, float]]) -> None:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=bundles)


def lean(trainer: type[Any]) -> type[Any]:
    """A subclass of Ray Train's trainer whose worker groups start two processes fewer, which take 0.2 GiB of memory and
    two seconds of a core each. One hands out Ray Data's datasets, of which raychain has none. The other frees the
    placement groups of a controller that died, which raychain does itself (`process_group.remove`); a group that starts
    would wait for it.
    """

    class Lean(trainer):
        def _create_default_callbacks(self) -> list[Any]:
            spared = ("DatasetsCallback", "PlacementGroupCleanerCallback")
            return [made for made in super()._create_default_callbacks() if type(made).__name__ not in spared]

    return Lean


def start_coordinator() -> None:
    """Has the process start through which Ray's own libraries ask the autoscaler, so that Ray Train's controller, which
    begins with a request, does not wait for it. Does nothing in a version of Ray that has none.
    """
    try:
        from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as client

        client.get_or_create_autoscaling_coordinator()
    except (ImportError, AttributeError, TypeError, ray.exceptions.RayError) as error:
        log.debug("the coordinator was not started ahead: %s", error)


@contextlib.contextmanager
def daemons_apart(started: Callable[[int], None]) -> Iterator[None]:
    """Within, each daemon that Ray starts leads a session of its own, whose id `started` is told.

    Ray has no public way: they share the process group of the program, and die of the signals that are sent to it.
    """
    try:
        from ray._private import services

        before = services.ConsolePopen
    except (ImportError, AttributeError) as error:
        missing("the start of its daemons, so a signal to the process group ends them before the workers save", error)
        yield
        return

    class Daemon(before):  # type: ignore[valid-type, misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "start_new_session": True})
            started(self.pid)

    services.ConsolePopen = Daemon  # type: ignore[misc]
    try:
        yield
    finally:
        services.ConsolePopen = before  # type: ignore[misc]


def stay_on_loopback() -> None:
    """Has nodes that this process starts with `--node-ip-address=127.0.0.1` listen there alone, and be several.

    Ray has a setting for that, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which forbids all but the head, and an address of
    its own choice without it.
    Raises RuntimeError in a version of Ray that does it in another way: a node would be open to the network.
    """
    try:
        from ray._private import ray_constants, services

        _ = ray_constants.ENABLE_RAY_CLUSTER, services.resolve_ip_for_localhost
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"Ray {ray.__version__} cannot be kept to this machine's own address: {error}") from error
    ray_constants.ENABLE_RAY_CLUSTER = True
    services.resolve_ip_for_localhost = lambda host: host


MANY_PROCESSES = "PYTHON worker processes have been started"


@contextlib.contextmanager
def many_processes() -> Iterator[None]:
    """Within, Ray's warnings of many processes on a node are not printed: a search's trials are such, and hold nothing.

    Ray has a setting for it that also decides how many of them start at once, and none for a cluster that runs.
    """
    try:
        from ray._private import worker

        before = worker.print_to_stdstream
    except (ImportError, AttributeError) as error:
        missing("its printing of warnings, so it warns of a search's processes", error)
        yield
        return

    def printed(data: Json, *rest: Any, **options: Any) -> None:
        lines = [line for line in data.get("lines", ()) if MANY_PROCESSES not in line]
        if lines:
            before({**data, "lines": lines}, *rest, **options)

    worker.print_to_stdstream = printed
    try:
        yield
    finally:
        worker.print_to_stdstream = before
