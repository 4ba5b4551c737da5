"""What a Ray cluster says of itself to somebody who only asks."""

from __future__ import annotations

import contextlib
import logging
from typing import NamedTuple

import ray

from raychain.backend_ray.address import Cluster, check_answers
from raychain.backend_ray.connection import JOINS_S, reason_of
from raychain.backend_ray.environment import absent, environment
from raychain.core.storage import answered
from raychain.errors import InputError


class Described(NamedTuple):
    """A cluster that answered."""

    nodes: int
    cpus: float
    gpus: float
    memory: float
    """Bytes."""


def ask(found: Cluster) -> Described:
    """Joins the cluster, asks what it has, and leaves it. Raises InputError where it does not answer or refuses."""
    check_answers(found)

    def joined() -> Described:
        with absent("RAY_ADDRESS"), environment({"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}):
            ray.init(address=found.address, log_to_driver=False, logging_level=logging.CRITICAL)
        try:
            has = ray.cluster_resources()
            nodes = sum(bool(node["Alive"]) for node in ray.nodes())
            return Described(nodes, has.get("CPU", 0.0), has.get("GPU", 0.0), has.get("memory", 0.0))
        finally:
            with contextlib.suppress(Exception):
                ray.shutdown()

    try:
        return answered(joined, f"the cluster at {found.address}", JOINS_S)
    except InputError:
        raise
    except Exception as error:
        fix = "start one, correct the address, or give its token (RAY_AUTH_TOKEN_PATH); Ray and Python are to be of "
        raise InputError(found.where, found.address, "a Ray cluster that answers",
                         f"{fix}the cluster's versions. Ray says: {reason_of(error)}") from None  # fmt: skip
