"""raychain: pre-train a family of vision foundation models as a chain, on Ray."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["grow", "run"]


def __getattr__(name: str) -> Any:
    # Imported on use: drawing processes and --help need neither torch nor Ray.
    if name == "run":
        from raychain.run import run

        return run
    if name == "grow":
        from raychain.growth import grow

        return grow
    raise AttributeError(name)
