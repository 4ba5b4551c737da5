"""The operators a user can name."""

from collections.abc import Mapping

from raychain.growth.depth import DepthOperator, interleave
from raychain.growth.embed import Embed
from raychain.growth.width import WidthOperator

WIDTH_OPERATORS: Mapping[str, WidthOperator] = {"embed": Embed()}
DEPTH_OPERATORS: Mapping[str, DepthOperator] = {"interleave": interleave}
