"""The rule by which a model between two others is made: open_clip's vision transformers with a text transformer.

Every size lies between those of the two models, so that the smaller grows into the new one and the new one into the
larger. Sizes are interpolated by the logarithm of the image tower's parameters; whole heads and layers near the ideal
ones are searched for those that meet the wanted parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from copy import deepcopy
from typing import NamedTuple

from raychain.models.configs import ModelConfig
from raychain.models.registry import difference, native_size

TOLERANCE = 0.05
"""Share by which a generated model's parameters may miss the wanted ones."""
EIGHTHS = 8
"""MLPs are so many parts of a width wider or narrower than usual, where heads and layers alone do not meet the size."""
_MISSED, _MLP, _UNUSUAL = 4.0, 0.5, 0.14
"""What parameters that miss the wanted ones and unusual MLPs weigh beside width and depth that miss the ideal ones, all
as logarithms: an MLP is made unusual where that saves 3.5 % of the parameters."""
_VISION: ModelConfig = {
    "image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64, "mlp_ratio": 4.0,
    "ls_init_value": None, "no_ln_pre": False, "pool_type": "tok", "final_ln_after_pool": False, "patch_dropout": 0.0,
    "pos_embed_type": "learnable", "act_kwargs": None,
}  # fmt: skip
"""The keys of an image tower that the rule knows, with open_clip's defaults."""
_TEXT: ModelConfig = {"width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}


class GenerationError(ValueError):
    """Between two models none can be made, or none of the wanted size.

    `option` is the key of `Generate` that is wrong, `allowed` what it may be, `fix` what to do.
    """

    def __init__(self, allowed: str, fix: str, option: str = "between") -> None:
        super().__init__(f"{allowed}; {fix}")
        self.allowed, self.fix, self.option = allowed, fix, option


class Tower(NamedTuple):
    """Sizes of a transformer."""

    width: int
    layers: int
    mlp_ratio: float
    head: int
    """Width of a head."""

    @property
    def hidden(self) -> int:
        """Units of its MLPs, as open_clip counts them."""
        return int(self.width * self.mlp_ratio)


class Sizes(NamedTuple):
    """Sizes of a model, which is what generated ones differ in."""

    image: Tower
    text: Tower
    embedding: int


def sizes(config: ModelConfig) -> Sizes:
    """The sizes of a `model_cfg`. Raises GenerationError where its image tower is none that the rule knows."""
    vision, text = config["vision_cfg"], {**_TEXT, **config["text_cfg"]}
    unknown = sorted(key for key, value in vision.items() if key not in _VISION and value)
    vision = {**_VISION, **vision}
    if unknown or not isinstance(vision["layers"], int):
        found = f"vision_cfg.{unknown[0]}" if unknown else "vision_cfg.layers of a ResNet"
        raise GenerationError("models whose image tower is open_clip's plain vision transformer",
                              f"there is no rule for {found}")  # fmt: skip
    return Sizes(
        _tower(vision, vision["width"] // vision["head_width"]),
        _tower(text, text["heads"]),
        config["embed_dim"],
    )


def _tower(found: ModelConfig, heads: int) -> Tower:
    return Tower(found["width"], found["layers"], found["mlp_ratio"], found["width"] // heads)


def image_params(config: ModelConfig, own: Sizes) -> int:
    """Parameters of the image tower of a model like that of `config`, of other sizes."""
    vision = {**_VISION, **config["vision_cfg"]}
    (width, layers, _, _), patch, pixels = own.image, vision["patch_size"], vision["image_size"]
    pixels = pixels if isinstance(pixels, int) else pixels[0]
    hidden = own.image.hidden
    block = 4 * width * width + 2 * width * hidden + 9 * width + hidden
    block += 2 * width if vision["ls_init_value"] is not None else 0
    norms = 2 * width if vision["no_ln_pre"] else 4 * width
    embeddings = width * (3 * patch * patch + 1 + 1 + (pixels // patch) ** 2)
    return embeddings + norms + layers * block + width * own.embedding


def between(small: ModelConfig, large: ModelConfig, ratio: float, head_dim: int | None = None) -> ModelConfig:
    """A `model_cfg` between two, whose image tower has `ratio` times the parameters of the smaller one's.

    It is a pure function of the two configs and the ratio. `head_dim` is the width of a head, which growth keeps.
    Raises GenerationError where the two differ in more than sizes, or no model between them meets the ratio to 5 %.
    """
    low, high = sizes(small), sizes(large)
    _check(small, large, low, high, head_dim)
    least, most = image_params(large, low), image_params(large, high)
    wanted = ratio * least
    share = math.log(ratio) / math.log(most / least)
    text = Tower(
        int(_near(low.text.width, high.text.width, share, low.text.head)),
        int(_near(low.text.layers, high.text.layers, share, 1)),
        _near(low.text.mlp_ratio, high.text.mlp_ratio, share, 1 / EIGHTHS),
        low.text.head,
    )
    embedding = int(_near(low.embedding, high.embedding, share, math.gcd(low.embedding, high.embedding, 64)))
    usual = _near(low.image.mlp_ratio, high.image.mlp_ratio, share, 1 / EIGHTHS)
    ideal = [_between(a, b, share) for a, b in zip(low.image[:2], high.image[:2], strict=True)]

    def cost(own: Sizes) -> tuple[float, Sizes]:
        missed = math.log(image_params(large, own) / wanted)
        shape = [math.log(a / b) for a, b in zip(own.image[:2], ideal, strict=True)]
        mlp = math.log(own.image.mlp_ratio / usual)
        terms = (*shape, _MISSED * missed, _MLP * mlp, _UNUSUAL * (mlp != 0))
        return sum(term * term for term in terms), own

    found = [Sizes(image, text, embedding) for image in _towers(low.image, high.image, usual)]
    near = [own for own in found if abs(image_params(large, own) / wanted - 1) <= TOLERANCE]
    if not near:
        nearest = min(found, key=lambda own: abs(math.log(image_params(large, own) / wanted)))
        have = image_params(large, nearest) / least
        raise GenerationError(
            f"a ratio that whole heads and layers between them meet within {100 * TOLERANCE:g} %",
            f"the nearest to {ratio:.4g} times the smaller one's parameters is {have:.4g}: leave this ratio out",
            "ratios",
        )
    return _with_sizes(large, min(near, key=cost))


def name_between(small: str, large: str, configs: tuple[ModelConfig, ModelConfig], config: ModelConfig) -> str:
    """What a model between two is called: what their names have in common, and its sizes in which they differ."""
    first, last = small.split("-"), large.split("-")
    before = [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
    first, last = first[len(before) :], last[len(before) :]
    pairs = zip(reversed(first), reversed(last), strict=False)
    after = [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)][::-1]
    own, (low, high) = sizes(config), (sizes(c) for c in configs)
    usual = own.image.mlp_ratio == low.image.mlp_ratio == high.image.mlp_ratio
    parts = [
        f"w{own.image.width}",
        f"d{own.image.layers}",
        *([] if usual else [f"m{own.image.mlp_ratio:g}"]),
        *([f"t{own.text.width}"] if low.text.width != high.text.width else []),
        *([f"td{own.text.layers}"] if low.text.layers != high.text.layers else []),
        *([f"tm{own.text.mlp_ratio:g}"] if low.text.mlp_ratio != high.text.mlp_ratio else []),
        *([f"e{own.embedding}"] if low.embedding != high.embedding else []),
    ]
    return "-".join([*(before or ["between"]), *parts, *after])


def _check(small: ModelConfig, large: ModelConfig, low: Sizes, high: Sizes, head_dim: int | None) -> None:
    """Whether the two differ in sizes alone, and grow. Raises GenerationError."""
    if other := difference(_with_sizes(small, high), _with_sizes(large, high)):
        raise GenerationError(
            "two models that differ in widths and depths alone", f"they differ in another way: {other}"
        )
    if native_size(small) != native_size(large):
        pixels = f"{native_size(small)} and {native_size(large)}"
        raise GenerationError("two models for pictures of one size", f"they are for {pixels} pixels")
    for tower, a, b in (("image", low.image, high.image), ("text", low.text, high.text)):
        if a.head != b.head:
            raise GenerationError("two models with heads of one width, which growth keeps",
                                  f"those of the {tower} towers are {a.head} and {b.head} wide")  # fmt: skip
        for name, x, y in (("width", a.width, b.width), ("depth", a.layers, b.layers), ("MLP", a.hidden, b.hidden)):
            if x > y:
                raise GenerationError("a smaller model that grows into the larger one",
                                      f"the {tower} tower's {name} falls from {x} to {y}")  # fmt: skip
    if head_dim not in (None, low.image.head):
        raise GenerationError(f"{low.image.head}, the width of the two models' heads, which growth keeps",
                              "leave it out, or name models with such heads", "head_dim")  # fmt: skip


def _towers(low: Tower, high: Tower, usual: float) -> Iterator[Tower]:
    """Every image tower between two, with MLPs of half to twice the usual width."""
    ratios = sorted({usual, *(k / EIGHTHS for k in range(round(usual * EIGHTHS / 2), round(usual * EIGHTHS * 2) + 1))})
    for width in range(low.width, high.width + 1, low.head):
        for ratio, layers in itertools.product(ratios, range(low.layers, high.layers + 1)):
            tower = Tower(width, layers, ratio, low.head)
            if low.hidden <= tower.hidden <= high.hidden:
                yield tower


def _between(low: float, high: float, share: float) -> float:
    return low * (high / low) ** share


def _near(low: float, high: float, share: float, step: float) -> float:
    """The multiple of `step` nearest, by ratio, to what lies at `share` of the way from `low` to `high`, or an end."""
    exact = _between(low, high, share)
    multiples = (step * count for count in (math.floor(exact / step), math.floor(exact / step) + 1))
    near = [low, high, *(value for value in multiples if min(low, high) < value < max(low, high))]
    return min(near, key=lambda value: (abs(math.log(value / exact)), value))


def _with_sizes(config: ModelConfig, own: Sizes) -> ModelConfig:
    """The config with these sizes; MLPs as open_clip has them where nothing is said are left out."""
    found = deepcopy(config) | {"embed_dim": own.embedding}
    image, text, vision_cfg, text_cfg = own.image, own.text, found["vision_cfg"], found["text_cfg"]
    vision_cfg.update(width=image.width, layers=image.layers, head_width=image.head)
    text_cfg.update(width=text.width, layers=text.layers, heads=text.width // text.head)
    for tower, ratio in ((vision_cfg, image.mlp_ratio), (text_cfg, text.mlp_ratio)):
        tower.pop("mlp_ratio", None)
        tower.update({"mlp_ratio": ratio} if ratio != _TEXT["mlp_ratio"] else {})
    return found
