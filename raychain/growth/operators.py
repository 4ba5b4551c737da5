"""The operators a user can name: raychain's own, and those of installed packages."""

from raychain.core.plugins import Plugins
from raychain.growth.centred import Centred
from raychain.growth.depth import DepthOperator, identity, interleave, stack
from raychain.growth.duplicate import Duplicate
from raychain.growth.embed import Embed
from raychain.growth.none import Nothing
from raychain.growth.reference import Reference
from raychain.growth.width import WidthOperator

DEFAULT_WIDTH = "centred"
DEFAULT_DEPTH = "identity"

WIDTH_OPERATORS: Plugins[WidthOperator] = Plugins(
    "raychain.width_operators",
    {
        "centred": Centred(),
        "duplicate": Duplicate(),
        "duplicate-uneven": Duplicate(uneven=0.5),
        "embed": Embed(),
        "none": Nothing(),
        "reference": Reference(),
    },
)
DEPTH_OPERATORS: Plugins[DepthOperator] = Plugins(
    "raychain.depth_operators", {"identity": identity, "interleave": interleave, "stack": stack}
)
