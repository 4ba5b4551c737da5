"""Looks at what lies elsewhere: a storage, a Ray cluster."""

from __future__ import annotations

import secrets
import time

from raychain.backend_ray.address import Cluster
from raychain.core.storage import Folder
from raychain.doctor.finding import Finding, size
from raychain.errors import without_secrets


def storage(address: str) -> Finding:
    """Writes a small object, reads it back, deletes it."""
    began, content = time.monotonic(), secrets.token_bytes(1024)
    folder, name = Folder(address), f"raychain-doctor-{secrets.token_hex(8)}"
    folder.write(name, content)
    try:
        found = folder.read(name)
    finally:
        folder.remove(name)
    took, shown = time.monotonic() - began, without_secrets(address)
    if found != content:
        return Finding("storage", "problem", f"{shown}: what was read is not what was written", "check the storage")
    if folder.exists(name):
        return Finding("storage", "problem", f"{shown}: what was deleted is still there", "allow deleting")
    return Finding("storage", "ok", f"{shown}: written, read and deleted in {took:.2f} s")


def cluster(found: Cluster) -> Finding:
    """Joins a Ray cluster and asks what it has."""
    from raychain.backend_ray.asking import ask

    has = ask(found)
    said = f"{found.address}: {has.nodes} nodes, {has.cpus:g} CPUs, {has.gpus:g} GPUs, {size(has.memory)} memory"
    return Finding("cluster", "ok", said)
