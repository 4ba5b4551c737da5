"""Experiment files that a person would not write: each is one message, soon, and without much memory."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raychain.config import load_experiment
from raychain.errors import InputError
from raychain.schema.yaml_text import MOST, YamlError, read_yaml

TEXT = """name: tiny
data: {train: shards}
chain:
  - {model: CoM-micro-S, epochs: 3}
"""
WORDS = st.text("abc: ", min_size=1, max_size=4)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


def answer(text: str | bytes, folder: Path, *overrides: str) -> str:
    """The message that a file with this content is answered with, within a bound on time."""
    path = folder / "tiny.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        load_experiment(str(path), overrides)
    assert time.monotonic() - started < 60, "seconds on a machine that is not busy"
    said = str(caught.value)
    assert said.startswith((str(path), "--set", "EXPERIMENT"))
    assert len(said) < 40_000
    return said


@given(PLAIN)
@settings(deadline=None)
@example("\x85")
def test_plain_data_is_read_as_pyyaml_reads_it(value: Any) -> None:
    text, other = yaml.safe_dump(value), yaml.safe_dump(value, allow_unicode=True)
    assert read_yaml(text) == yaml.safe_load(text)
    assert read_yaml(other.encode("utf-16")) == yaml.safe_load(other)  # for which a line end is a space


@given(st.text(st.sampled_from("ab:-[]{}&*!|>'\"#%@`,?\n\t =<01.\x00\ufeff\ud800é"), max_size=60))
@settings(deadline=None, max_examples=400)
def test_any_text_is_data_or_one_error(text: str) -> None:
    for given_ in (text, text.encode("utf-8", "surrogatepass")):
        said = ""
        try:
            read_yaml(given_)
        except YamlError as error:
            said = str(error)
        assert "\n" not in said


@given(st.lists(WORDS, min_size=1, max_size=6), st.data())
@settings(deadline=None)
def test_a_key_that_stands_twice_is_an_error_at_any_depth_in_any_style(keys: list[str], data: st.DataObject) -> None:
    quoted = ['"' + key + '"' for key in keys]
    repeated = len(set(keys)) < len(keys)
    depth = data.draw(st.integers(0, 5))
    flow = "[" * depth + "{" + ", ".join(f"{key}: 1" for key in quoted) + "}" + "]" * depth
    block = [" " * n + f"k{n}:" for n in range(depth)] + [" " * depth + f"{key}: 1" for key in quoted]
    for text in (flow, "\n".join(block)):
        if repeated:
            with pytest.raises(YamlError, match="stands twice"):
                read_yaml(text)
        else:
            read_yaml(text)


def test_a_second_key_names_both_lines(tmp_path: Path) -> None:
    said = answer(TEXT + "data: {train: others}\n", tmp_path)
    assert "tiny.yaml, line 5" in said
    assert "data: stands twice in one mapping, first on line 2" in said
    said = answer(TEXT + "train:\n  lr: 1\n  seed: 1\n  'lr': 2\n", tmp_path)
    assert "line 8" in said
    assert "first on line 6" in said
    assert "stands twice" in answer(TEXT, tmp_path, "train={lr: 1, lr: 2}")


def laughs(deep: int, inner: str, join: str) -> str:
    lines = [f"a0: &a0 {inner}"]
    return "\n".join(lines + [f"a{n + 1}: &a{n + 1} {join.format(','.join([f'*a{n}'] * 9))}" for n in range(deep)])


STRANGE: dict[str, tuple[str | bytes, str]] = {
    "aliases that multiply": (laughs(9, "[lol]", "[{}]"), f"more than {MOST:,} values"),
    "merges that multiply": (laughs(9, "{k: 1}", "{{<<: [{}]}}"), f"more than {MOST:,} values"),
    "an alias of itself": ("a: &a [1, *a]\n", "stands in what it stands for"),
    "deep lists": ("a: " + "[" * 5000, "levels"),
    "deep blocks": ("- " * 5000, "levels"),
    "deep keys": ("? " * 5000, "levels"),
    "a large file": (b"#" * 2**21, "more than 1,048,576 bytes"),
    "many values": ("[" + "1," * 60_000, "values"),
    "many unknown keys": (TEXT + "".join(f"x{n}: 1\n" for n in range(5000)), "4990 more of the kind"),
    "tabs": ("train:\n\tlr: 1\n", "line 2"),
    "an object": ("a: !!python/object/apply:os.system [true]\n", "tag"),
    "a tag": ("a: !mine x\n", "!mine"),
    "a number as key": ("1: x\n", "a key that is not text"),
    "null as key": ("null: x\n", "a key that is not text"),
    "a truth value as key": ("on: x\n", "on: a key that is not text"),
    "a list as key": ("? [a]\n: x\n", "a key that is not text"),
    "a long number": ("a: " + "9" * 9999, "cannot be read as int"),
    "a wrong number": ("a: !!int x\n", "cannot be read as int"),
    "a list": ("- a\n", "given    a list"),
    "nothing": ("", "given    nothing"),
    "a word": ("word", "given    a str"),
    "latin-1": (TEXT.encode() + b"# caf\xe9\n", "line 5"),
    "a control character": (TEXT.encode() + b"a: \x1b[2J\n", "line 5"),
    "a tar": (b"name\0\0\0\0", "line 1"),
    "two documents": (TEXT + "---\n" + TEXT, "single document"),
    "half a document": ("a: [1,\n", "line 2"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_strange_file_is_one_message(tmp_path: Path, case: str) -> None:
    text, expected = STRANGE[case]
    assert expected in answer(text, tmp_path)


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("train.lr=.nan", "train.lr"),
        ("train.lr=.inf", "train.lr"),
        ("train.lr=1e999", "train.lr"),
        ("data.samples=.inf", "data.samples"),
        ("preload.budget=.inf", "preload.budget"),
        ("preload.budget=1e999", "preload.budget"),
        ("preload.budget=1e30", "preload.budget"),
        ("chain.0.epochs=.inf", "chain.0.epochs"),
        ("chain.0.epochs=1e999", "chain.0.epochs"),
        ("chain.0.epochs=1e300 steps", "chain.0.epochs"),
        ("train.warmup=1e999 %", "train.warmup"),
        ("checkpoint.every=1e999 hours", "checkpoint.every"),
        ("allocation={budget: .inf}", "allocation.budget"),
        ("allocation={budget: 1e999}", "allocation.budget"),
        ("name=[1]", "name"),
        ("train={lr: 1, lr: 2}", "--set train"),
        ("train={1: 2}", "--set train"),
        ("train=&a [*a]", "--set train"),
        ("train=" + "[" * 999, "--set train"),
        ("train=!!python/name:os.system", "--set train"),
        ("chain.9.epochs=1", "chain.9"),
        ("chain.-1.epochs=1", "chain.-1"),
        ("chain.².epochs=1", "chain.²"),
        ("chain." + "9" * 5000 + ".epochs=1", "--set"),
        ("chain.0.epochs.x=1", "--set"),
        ("name.x=1", "--set"),
        ("=1", "--set"),
        ("..=1", "--set"),
        ("train.lr", "--set"),
        ("data.train=\ud800", "data.train"),
    ],
)  # fmt: skip
def test_a_strange_override_is_one_message(tmp_path: Path, override: str, where: str) -> None:
    assert where in answer(TEXT, tmp_path, override)


def test_a_list_is_reached_and_an_empty_one_says_so(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TEXT)
    assert load_experiment(str(path), ["chain.0.data.samples=7"]).chain[0].data.samples == 7
    assert "empty list" in answer(TEXT, tmp_path, "chain=[]", "chain.0.epochs=1")


def test_aliases_and_merges_are_usable_and_a_change_in_one_place_is_none_in_another(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "name: 2024-01-01\ndata: {train: shards}\n"
        "chain:\n  - &s {model: CoM-micro-S, epochs: 3, data: &d {samples: 5}}\n  - {<<: *s, model: CoM-micro-M}\n"
    )
    experiment = load_experiment(str(path), ["chain.1.data.samples=7"])
    assert experiment.name == "2024-01-01"
    assert [(s.model, str(s.epochs), s.data.samples) for s in experiment.chain] == [
        ("CoM-micro-S", "3 epochs", 5),
        ("CoM-micro-M", "3 epochs", 7),
    ]


def test_a_path_that_is_no_file_is_one_message_and_nothing_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.yaml"))
    for name, said in {
        f"{tmp_path}/pipe.yaml": "a pipe, not a file",
        f"{tmp_path}/folder.yaml": "a folder, not a file",
        f"{tmp_path}/socket.yaml": "a socket, not a file",
        f"{tmp_path}/loop.yaml": "symbolic links",
        f"{tmp_path}/{'x' * 300}.yaml": "too long",
        f"{tmp_path}/none.yaml": "no such file",
        "/dev/zero": "a device, not a file",
        "/dev/stdin/x": "Not a directory",
        "/nul\0/x.yaml": "no such file",
        "/half\ud800/x.yaml": "no such file",
    }.items():
        with pytest.raises(InputError) as caught:
            load_experiment(name)
        assert said.lower() in str(caught.value).lower()
