"""Growing a small trained model into a larger one: width and depth operators on parameters described by axes."""

from raychain.growth.engine import GrowthError, GrowthReport, TowerGrowth, check, grow
from raychain.growth.operators import DEPTH_OPERATORS, WIDTH_OPERATORS

__all__ = ["DEPTH_OPERATORS", "WIDTH_OPERATORS", "GrowthError", "GrowthReport", "TowerGrowth", "check", "grow"]
