"""One file per architecture: its parameters described by axes. `describe` puts a whole model's description together."""

from raychain.models.architectures.model import ModelDescription, describe

__all__ = ["ModelDescription", "describe"]
