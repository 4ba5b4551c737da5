"""The process group of a Ray Train worker group, and the placement group that holds its resources.

Ray's own `TorchConfig` makes the controller import torch before it starts a worker: 1.5 seconds of a core and 0.3 GiB
for each group, where only the workers need it. This one leaves torch to them.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.util import get_current_placement_group, get_node_ip_address, remove_placement_group
from ray.util.placement_group import PlacementGroup


@dataclass
class ProcessGroup(BackendConfig):
    """torch.distributed's process group over all workers of a Ray Train group, for `TorchTrainer(torch_config=…)`."""

    backend: str
    """nccl or gloo."""
    mailbox: Any
    """The Mailbox actor, which is told the workers' placement group first."""
    timeout_s: int = 1800
    """After so many seconds a collective call fails."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The class whose `on_start` Ray Train's controller calls when the workers' processes are there."""
        return Connecting


class Connecting(Backend):
    """Connects the workers before they train, and disconnects them afterwards; runs in Ray Train's controller."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Tells the mailbox the placement group, then joins all workers into one process group.

        Where a worker dies in its first moments Ray Train gives up without removing its group's placement group, and
        the resources stay taken; whoever has the mailbox can remove it.
        """
        settings: Any = backend_config
        ray.get(settings.mailbox.placed.remote(worker_group.execute_single(0, get_current_placement_group)))
        address, port = worker_group.execute_single(0, free_address)
        worker_group.execute(connect, settings.backend, address, port, settings.timeout_s)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:  # noqa: ARG002 - as Ray calls it
        """Takes the process group apart; workers that do not answer within 30 s are left to Ray, which ends them."""
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            ray.get(worker_group.execute_async(disconnect), timeout=30)


def free_address() -> tuple[str, int]:
    """The address of this node and a TCP port that nobody listens on."""
    address = get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listening:
        listening.bind(("", 0))
        return address, listening.getsockname()[1]


def connect(backend: str, address: str, port: int, timeout_s: int) -> None:
    """Makes the calling worker a member of the process group; sets the environment variables that torchrun sets."""
    import ray.train.torch
    import torch

    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    if backend == "nccl":
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # a lost rank ends the others' calls
        torch.cuda.set_device(ray.train.torch.get_device())
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def disconnect() -> None:
    """Leaves the process group, if the calling worker is a member of one."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def remove(groups: Iterable[PlacementGroup]) -> None:
    """Removes placement groups; those that are gone already are passed over."""
    for group in groups:
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            remove_placement_group(group)
