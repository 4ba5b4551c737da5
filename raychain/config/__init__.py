"""What a user may write: the experiment schema, durations, and reading files with helpful errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raychain.config.experiment import Experiment
    from raychain.config.loading import load_experiment

__all__ = ["Experiment", "load_experiment"]


def __getattr__(name: str) -> Any:
    # Imported on use: components that the schema is made of import their base class from this package.
    if name == "Experiment":
        from raychain.config.experiment import Experiment

        return Experiment
    if name == "load_experiment":
        from raychain.config.loading import load_experiment

        return load_experiment
    raise AttributeError(f"module 'raychain.config' has no attribute {name!r}")
