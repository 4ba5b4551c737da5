"""What a user may write: the experiment schema, durations, and reading files with helpful errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raychain.config.experiment import Experiment
    from raychain.config.loading import load_experiment, opened

__all__ = ["Experiment", "load_experiment", "opened"]


def __getattr__(name: str) -> Any:
    # Imported on use: components that the schema is made of import their base class from this package.
    if name == "Experiment":
        from raychain.config.experiment import Experiment

        return Experiment
    if name in ("load_experiment", "opened"):
        from raychain.config import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'raychain.config' has no attribute {name!r}")
