"""What a user may write: the experiment schema, durations, and reading files with helpful errors."""

from raychain.config.experiment import Experiment
from raychain.config.loading import load_experiment

__all__ = ["Experiment", "load_experiment"]
