"""Model families: their open_clip configs, how they are built, and their parameters described by axes."""

from raychain.families.building import build, parameter_count
from raychain.families.registry import UnknownModelError, model_config, model_names

__all__ = ["UnknownModelError", "build", "model_config", "model_names", "parameter_count"]
