"""Captions by key, descriptions by the sentence, and which of them are drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raychain.config.loading import validate
from raychain.data.members import Wanted, captions
from raychain.data.order import Rows, draw_captions
from raychain.data.sentences import sentences
from raychain.errors import InputError
from raychain.schema.captions import CaptionKey, caption_key

SPLIT = {
    "A dog runs. It is brown. The end": ["A dog runs.", "It is brown.", "The end"],
    "a dog on grass. a cat beside it.": ["a dog on grass.", "a cat beside it."],
    "Mr. Smith, e.g. the elder, met Dr. J. K. Roe. They left.": [
        "Mr. Smith, e.g. the elder, met Dr. J. K. Roe.",
        "They left.",
    ],
    "It cost $3.50 in v1.2.3. Cheap.": ["It cost $3.50 in v1.2.3.", "Cheap."],
    "He waits... and waits... Then he goes… away.": ["He waits... and waits...", "Then he goes… away."],
    "Really?! Yes! Is it?": ["Really?!", "Yes!", "Is it?"],
    '"Stop!" he said. "Go." She left.': ['"Stop!" he said.', '"Go."', "She left."],
    "(A sign.) It says “No. 5”.": ["(A sign.)", "It says “No. 5”."],
    "1. A dog. 2. A cat.": ["1. A dog.", "2. A cat."],
    "At 5 p.m. the bus left. At 6 p.m. It came.": ["At 5 p.m. the bus left.", "At 6 p.m.", "It came."],
    "The U.S. flag in 1999. Blue.": ["The U.S. flag in 1999.", "Blue."],
    "One line\nanother line.\n\n- a third": ["One line", "another line.", "- a third"],
    "犬がいる。猫もいる！": ["犬がいる。", "猫もいる！"],
    " ... \n --- ": [],
    "": [],
    "see www.site.com/a.b for more": ["see www.site.com/a.b for more"],
}


@pytest.mark.parametrize("text", SPLIT)
def test_texts_are_split_into_their_sentences(text):
    assert sentences(text) == SPLIT[text]


@given(st.text(alphabet="ab1.!?… \n\"')。", max_size=60))
def test_splitting_loses_no_word_and_splits_no_further_the_second_time(text):
    found = sentences(text)
    assert "".join(c for s in found for c in s if c.isalnum()) == "".join(c for c in text if c.isalnum())
    assert all(s == s.strip() for s in found)


def test_keys_are_taken_apart():
    assert caption_key("txt") == CaptionKey("txt", (), False)
    assert caption_key("json.a.b|sentences") == CaptionKey("json", ("a", "b"), True)
    assert caption_key("txt|lines") == CaptionKey("txt", (), False, lines=True)


def test_lines_of_a_text_are_captions():
    """As clip_benchmark reads retrieval shards."""
    assert captions({"txt": b"A dog. It runs.\n\n a cat \n"}, ("txt|lines",)) == ["A dog. It runs.", "a cat"]


@pytest.mark.parametrize(
    "key", ["txt|sentence", "json.a|", "json.a|words", "json", "json.", "", "|sentences", "json..a"]
)
def test_a_key_of_another_form_is_refused_before_anything_starts(key, tree):
    tree["data"]["captions"]["keys"] = ["txt", key]
    with pytest.raises(InputError, match=r"json\.KEY\|sentences") as error:
        validate(tree)
    assert "data.captions.keys" in str(error.value)


def test_a_misspelt_suffix_is_corrected(tree):
    tree["data"]["captions"]["keys"] = "txt|sentance"
    with pytest.raises(InputError, match="did you mean sentences"):
        validate(tree)


def test_sentences_of_texts_and_lists_are_captions_without_repetitions():
    content = {
        "txt": b"Raw. Two.",
        "json": json.dumps({"long": ["A bat. Cows.", "Two. Eel."], "short": "A bat. Cows."}).encode(),
    }
    assert captions(content, ("txt", "json.long|sentences")) == ["Raw. Two.", "A bat.", "Cows.", "Two.", "Eel."]
    assert captions(content, ("txt|sentences", "json.short")) == ["Raw.", "Two.", "A bat. Cows."]


def test_variants_of_a_key_are_cached_apart():
    keys = ["txt", "txt|sentences", "json.a", "json.a|sentences"]
    assert len({Wanted((key,)).digest for key in keys}) == len(keys)
    assert Wanted(("txt|sentences", "json.a|sentences")).extensions == {"txt", "json"}


@pytest.mark.parametrize("per_image", [1, 2, 5])
def test_over_passes_every_sentence_is_drawn_for_every_sample(per_image):
    """Pools of 1 to 9 sentences: each, the last included, is drawn; per sample, and the same on every call."""
    pool = np.arange(1, 10)
    seen = [set() for _ in pool]
    draws = []
    for passes in range(60):
        rows = Rows(np.zeros(9, np.int64), np.arange(9), np.full(9, passes))
        drawn = draw_captions(3, rows, pool, per_image)
        assert np.array_equal(drawn, draw_captions(3, rows, pool, per_image))
        alone = draw_captions(3, Rows(*(column[4:5] for column in rows)), pool[4:5], per_image)
        assert np.array_equal(alone, drawn[4:5]), "what a sample draws does not depend on the batch"
        for sample, chosen in enumerate(drawn.tolist()):
            assert len(set(chosen)) == min(per_image, pool[sample]), "without replacement"
            seen[sample].update(chosen)
        draws.append(drawn)
    assert seen == [set(range(size)) for size in pool]
    same_pool = np.full(9, 9)
    rows = Rows(np.zeros(9, np.int64), np.arange(9), np.zeros(9, np.int64))
    assert len({tuple(chosen) for chosen in draw_captions(3, rows, same_pool, per_image).tolist()}) > 1
