"""What a run ran on, for run.json."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from raychain.core.json import Json

PACKAGES = {"raychain": "raychain", "torch": "torch", "ray": "ray", "open_clip": "open_clip_torch", "timm": "timm"}
CHECKOUT = Path(__file__).resolve().parents[2]


def environment() -> Json:
    """Python, platform, cores and GPU names of this machine, package versions, raychain's git commit, the date.

    `commit` ends in `-dirty` when the checkout has changes, and is None where raychain is not run from a checkout.
    """
    import torch

    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": versions(),
        "commit": _commit(),
    }


def versions() -> dict[str, str | None]:
    """Installed version of each package that a result or a fault may depend on; None where it is not installed."""
    return {name: _version(distribution) for name, distribution in PACKAGES.items()}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    if not (CHECKOUT / ".git").exists():  # installed: a repository further up would be someone else's
        return None
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 - fixed words
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
