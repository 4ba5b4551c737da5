"""Model families: their open_clip configs, how they are built, and their parameters described by axes."""

from raychain.models.building import at_image_size, build, parameter_count
from raychain.models.registry import UnknownModelError, family_of, matching_models, model_config, model_names

__all__ = [
    "UnknownModelError",
    "at_image_size",
    "build",
    "family_of",
    "matching_models",
    "model_config",
    "model_names",
    "parameter_count",
]
