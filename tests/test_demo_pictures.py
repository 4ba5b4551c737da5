"""What the demo draws: pictures as their captions say, splits that share nothing, names that can be told apart."""

from collections import Counter
from io import BytesIO
from random import Random

import numpy as np
import pytest
from PIL import Image

from raychain.demo.captions import TOKENS, describe
from raychain.demo.compositions import LEAST_NAMES, Compositions, Recipe
from raychain.demo.glyphs import draw_glyphs
from raychain.demo.names import with_article
from raychain.demo.pictures import Painter


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_retrieval_caption_describes_one_picture_only(split: str) -> None:
    names = [f"thing{number}" for number in range(60)]
    recipes = Compositions(60, 0, 300).retrieval(split)  # type: ignore[arg-type]
    captions = [caption for recipe in recipes for caption in describe(recipe, names, 0.5, Random(0)).captions]
    assert len(recipes) == 300
    assert max(Counter(captions).values()) == 1


@pytest.mark.parametrize("names", [LEAST_NAMES, 5, 30, 500])
@pytest.mark.parametrize("seed", [0, 7])
def test_splits_share_no_pair_and_no_background_of_a_name(names: int, seed: int) -> None:
    drawn = Compositions(names, seed, 50)

    def keys(recipes: list[Recipe]) -> set[object]:
        pairs = {frozenset((r.first, r.second)) for r in recipes if r.second is not None}
        return pairs | {(r.first, r.kind, r.colour) for r in recipes if r.second is None}

    train = [recipe for start in range(0, 4 * names, names) for recipe in drawn.train(start, names)]
    held_out = {s: keys(drawn.retrieval(s)) | keys(drawn.zero_shot(s, 6)) for s in ("validation", "test")}  # type: ignore[arg-type]
    assert not keys(train) & (held_out["validation"] | held_out["test"])
    assert not held_out["validation"] & held_out["test"]
    assert {name for recipe in train for name in (recipe.first, recipe.second)} >= set(range(names))
    assert len(set(drawn.retrieval("test"))) == len(drawn.retrieval("test")) > 0


@pytest.mark.parametrize("vertical", [False, True])
def test_pictures_show_the_arrangement_their_captions_state(vertical: bool) -> None:
    masters = np.zeros((2, 48, 48, 4), np.uint8)
    masters[0, ..., [0, 3]], masters[1, ..., [2, 3]] = 255, 255  # name 0 is all red, name 1 all blue
    painter, rng = Painter(48, masters, [True, True]), Random(0)
    recipe = Recipe(0, 1, vertical, "plain", "white")
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for _ in range(50):
        picture, scale = painter.paint(recipe, rng)
        pixels = np.asarray(Image.open(BytesIO(picture))).astype(int)
        red, blue = pixels[..., 0] - pixels[..., 2] > 120, pixels[..., 2] - pixels[..., 0] > 120
        where = np.array([np.argwhere(mask).mean(axis=0) for mask in (red, blue)])  # (y, x) of each
        down, right = where[1] - where[0]
        along, across = (down, right) if vertical else (right, down)
        assert along > 2 * abs(across)
        described = describe(recipe, ["red thing", "blue thing"], scale, rng)
        first_is_red = described.names[0] == "red thing"
        assert (described.relation in ("left of", "above")) == first_is_red
        said = f"a {described.names[1]} {inverse[str(described.relation)]} a {described.names[0]}"
        assert said in {caption.replace("to the ", "") for caption in described.captions}


def test_captions_fit_the_small_text_towers() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    encode, rng = SimpleTokenizer().encode, Random(0)
    names = [name.text for name in draw_glyphs(240, 16).names]
    described = [describe(recipe, names, 0.5, rng) for recipe in Compositions(240, 0, 1000).train(0, 4000)]
    lengths = [2 + len(encode(caption)) for one in described for caption in one.captions]
    assert sum(length > TOKENS for length in lengths) < 0.01 * len(lengths)


def test_a_longer_list_of_names_begins_with_the_shorter_one() -> None:
    short, long = draw_glyphs(30, 16), draw_glyphs(240, 24)
    assert long.names[:30] == short.names
    assert all(name.pick for name in long.names)
    colourful = (long.masters[..., :3].max(axis=-1).astype(int) - long.masters[..., :3].min(axis=-1)).max(axis=(1, 2))
    assert (colourful > 60).mean() > 0.8  # COLR layers are drawn, not the outlines alone


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("cat", "a cat"),
        ("umbrella", "an umbrella"),
        ("unicorn", "a unicorn"),
        ("hourglass", "an hourglass"),
        ("x-ray", "an x-ray"),
        ("euro banknote", "a euro banknote"),
        ("grapes", "grapes"),
        ("bus", "a bus"),
        ("glass of milk", "a glass of milk"),
        ("globe with meridians", "a globe with meridians"),
        ("bacon", "bacon"),
        ("Santa Claus", "Santa Claus"),
        ("Statue of Liberty", "the Statue of Liberty"),
    ],
)
def test_articles(name: str, phrase: str) -> None:
    assert with_article(name) == phrase
