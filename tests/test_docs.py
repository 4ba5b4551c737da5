"""The documentation: every key is described with an example that the schema takes, and the site builds."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raychain.config.loading import validate

ROOT = Path(__file__).resolve().parents[1]
BASE: dict[str, Any] = {
    "name": "example",
    "data": {"train": "data/*.tar"},
    "evaluate": {"zero_shot": "data/names"},
}
CHAIN = [{"model": "CoM-micro-S", "epochs": 4}, {"model": "CoM-micro-M", "epochs": 2}]
BESIDE: dict[str, dict[str, Any]] = {
    "family": {"chain": None},
    "allocation": {"chain": None, "family": "CoM-ViT-{T,S,B,L}-16"},
    "generate": {},
    "train.cooldown": {"train": {"schedule": "wsd"}},
    "data.augment_on": {"data": {"train": "data/*.tar", "crop": [0.9, 1.0]}},
    "data.demo": {"data": {"train": "data/*.tar", "demo": {"out": "data/demo"}}},
}
"""What an example needs beside it, by the beginning of its key."""


TASKS: dict[str, dict[str, Any]] = {"classify": {"classes": 10, "loss": "bce"}}
"""What a paradigm's options need beside an example."""


@pytest.fixture(scope="module")
def configuration() -> Any:
    sys.path.insert(0, str(ROOT / "docs" / "site"))
    return importlib.import_module("configuration")


def test_every_key_has_a_description_a_type_and_an_example(configuration: Any) -> None:
    keys = [key for section in configuration.sections() for key in section.keys]
    assert len(keys) > 100
    assert [key.path for key in keys if not key.text] == []
    assert {key.path for key in keys if key.kind == "mapping"} >= {"data", "train"}
    assert [key.path for key in keys if "(mapping" in key.kind and key.path not in ("chain", "chain.N.changes")] == []
    known = {configuration.shared(key.path) for key in keys}
    assert known == set(configuration.examples())


def test_every_example_is_one_that_the_schema_takes(configuration: Any) -> None:
    for path, shown in configuration.examples().items():
        validate(_with(path, shown["example"]), path)


def _with(path: str, example: Any) -> dict[str, Any]:
    """A whole experiment in which the key at `path` has the value `example`."""
    tree = {**BASE, "chain": CHAIN}
    for start, beside in BESIDE.items():
        if path.startswith(start):
            tree = {key: value for key, value in (tree | beside).items() if value is not None}
    if path.startswith("task ("):
        kind, name = path.removeprefix("task (").split(").")
        return tree | {"task": {"paradigm": kind, **TASKS.get(kind, {}), name: example}}
    if path.startswith("evaluate.NAME ("):
        kind, name = path.removeprefix("evaluate.NAME (").split(").")
        return tree | {"evaluate": {"mine": {"type": kind, "data": "data/names", name: example}}}
    head, *rest = path.split(".")
    if not rest:
        return tree | {head: example}
    return tree | {head: _put(tree.get(head), rest, example, path)}


FIRST = {
    "chain": CHAIN[0],
    "data.train": {"shards": "a/*.tar"},
    "generate": {"between": ["CoM-micro-S", "CoM-micro-L"], "ratios": [3]},
    "chain.N.changes": {"at": "5 steps", "lr": 1e-4},
    "chain.N.start": {"checkpoint": "a"},
    "baseline": {"model": "CoM-micro-L", "epochs": 4},
    "search.space.split": {"total": "30 %", "shares": [1, 2]},
}
"""The other keys that a mapping must have, by its path."""


def _put(at: Any, rest: list[str], example: Any, path: str) -> Any:
    """`at` with the example put where `rest` leads."""
    within = path[: len(path) - len(".".join(rest)) - 1]
    name, *more = rest
    if name == "N":
        return [_put(FIRST.get(within, {}), more, example, path), *(CHAIN[1:] if within == "chain" else [])]
    base = at if isinstance(at, dict) else {"train": "data/*.tar"} if within == "data" else FIRST.get(within, {})
    if within == "chain.N" and name == "checkpoint":
        return {"checkpoint": example}
    return {**base, name: example if not more else _put(base.get(name), more, example, path)}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "reference" / "configuration.html").stat().st_size > 50_000
