"""Where the Ray cluster is that a run joins, as far as that can be told without Ray."""

from __future__ import annotations

import os
import re
import socket
from typing import NamedTuple

from raychain.errors import InputError

VARIABLE = "RAY_ADDRESS"
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray where a command runs as a submitted job."""
ANSWERS_S = 10.0
"""How long a cluster may take to accept a connection, and then to answer."""
ALLOWED = "HOST:PORT of a Ray cluster's head (port 6379 unless it was started with another), auto, or local"
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""What a gRPC client says first: HTTP/2's preface and empty settings."""
SETTINGS = 4
"""The type of the frame that a gRPC server answers with at once."""


class Cluster(NamedTuple):
    """A cluster's address, and where it was given."""

    address: str
    where: str


def cluster(address: str | None) -> Cluster | None:
    """The cluster to join: `address`, else that of RAY_ADDRESS; None for an instance of this machine's own.

    Raises InputError where it is no address of a cluster. In a submitted job whose RAY_ADDRESS is the jobs API's, which
    is for `ray job submit`, it is the cluster that the job runs on.
    """
    given, where = (address, "--address") if address else (os.environ.get(VARIABLE, ""), VARIABLE)
    given = given.strip()
    if given in ("", "local"):
        return None
    if given.startswith(("http://", "https://")):
        if where == VARIABLE and IN_A_JOB in os.environ:
            return Cluster("auto", where)
        raise InputError(where, given, ALLOWED,
                         "this is the address of the jobs API: send the command there with `ray job submit`, or unset "
                         f"{VARIABLE} to train on this machine")  # fmt: skip
    if given.startswith("ray://"):
        raise InputError(where, given, ALLOWED,
                         "Ray's client connections do not carry a training run: run it on a node of the cluster with "
                         "HOST:6379, or use `ray job submit`")  # fmt: skip
    if given != "auto" and _host_and_port(given) is None:
        raise InputError(where, given, ALLOWED, "give host and port, for example 10.0.0.5:6379")
    return Cluster(given, where)


def check_answers(found: Cluster) -> None:
    """Raises InputError unless something at the address speaks gRPC; Ray itself would try for minutes."""
    place = _host_and_port(found.address)
    if place is None:
        return
    try:
        with socket.create_connection(place, timeout=ANSWERS_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return
            connection.sendall(HELLO)
            answer = connection.recv(9)
        problem = "" if len(answer) > 3 and answer[3] == SETTINGS else "what listens there is no Ray cluster"
    except TimeoutError:
        problem = f"nothing answered within {ANSWERS_S:g} s"
    except (OSError, UnicodeError) as error:
        problem = str(error)
    if problem:
        fix = f"start one, or correct the address ({problem})"
        raise InputError(found.where, found.address, "a Ray cluster that answers", fix)


def _host_and_port(address: str) -> tuple[str, int] | None:
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})", address)
    if found is None or not 1024 <= int(found[2]) <= 65535:  # as Ray has it
        return None
    return found[1].strip("[]"), int(found[2])
