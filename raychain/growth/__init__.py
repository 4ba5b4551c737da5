"""Growing a small trained model into a larger one: width and depth operators on parameters described by axes."""

from raychain.growth.engine import GrowthReport, grow
from raychain.growth.moments import Moments, grow_moments, read_moments, write_moments
from raychain.growth.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from raychain.growth.plan import GrowthError, TowerGrowth, check

__all__ = [
    "DEPTH_OPERATORS",
    "WIDTH_OPERATORS",
    "GrowthError",
    "GrowthReport",
    "Moments",
    "TowerGrowth",
    "check",
    "grow",
    "grow_moments",
    "read_moments",
    "write_moments",
]
