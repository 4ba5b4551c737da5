"""`raychain data build` of class folders."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raychain.cli.commands import commands
from raychain.cli.program import guarded
from raychain.data.members import Wanted
from raychain.data.shards import survey
from raychain.dataprep.build import Options
from raychain.dataprep.folders import build_folders, open_folders
from raychain.errors import InputError


def folders(root: Path, counts: dict[str, int]) -> Path:
    """Class folders of small pictures in several formats, one of them deeper, and things that are no pictures."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        for i in range(count):
            path = root / name / ("deeper" if i == 1 else "") / f"{i}.{('png', 'JPEG', 'gif')[i % 3]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)).save(path)
        (root / name / "notes.txt").write_text("no picture")
        (root / name / ".hidden.png").write_text("no picture")
    return root


def labels(folder: Path) -> list[int]:
    """Labels in the order of the shards."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [int(tar.extractfile(m).read()) for m in tar if m.name.endswith(".cls")]  # type: ignore[union-attr]
    return found


def test_class_folders_become_mixed_shards_with_a_test_set_and_continue(tmp_path: Path) -> None:
    root = folders(tmp_path / "in", {"b cat": 20, "a dog": 10, "emu": 30})
    options = Options(samples_per_shard=25)
    result = build_folders(open_folders(str(root), 0.2), str(tmp_path / "out"), options)
    assert (tmp_path / "out" / "classnames.txt").read_text() == "a dog\nb cat\nemu\n"
    train, test = labels(tmp_path / "out" / "train"), labels(tmp_path / "out" / "test")
    assert (len(train), len(test)) == (48, 12)
    assert [test.count(label) for label in range(3)] == [2, 4, 6], "the same share of each"
    assert (len(set(train[:10])), train != sorted(train)) == (3, True), "classes are mixed"
    assert result["classes"] == 3
    shards = sorted(map(str, (tmp_path / "out" / "train").glob("*.tar")))
    assert len(shards) == 2
    cache = tmp_path / "cache"
    (cache / "counts").mkdir(parents=True)
    assert sum(s.samples for s in survey(shards, Wanted(label=True), cache, "x")) == 48
    before = [Path(shard).read_bytes() for shard in shards]
    build_folders(open_folders(str(root), 0.2), str(tmp_path / "out"), options)
    assert [Path(shard).read_bytes() for shard in shards] == before
    build_folders(open_folders(str(root), 0.2), str(tmp_path / "again"), options)
    assert [p.read_bytes() for p in sorted((tmp_path / "again" / "train").glob("*.tar"))] == before


def test_a_data_set_in_train_and_val_keeps_its_parts(tmp_path: Path) -> None:
    folders(tmp_path / "in" / "train", {"x": 4, "y": 5, "z": 3})
    folders(tmp_path / "in" / "val", {"x": 2, "z": 3})
    build_folders(open_folders(str(tmp_path / "in")), str(tmp_path / "out"), Options())
    assert len(labels(tmp_path / "out" / "train")) == 12
    assert sorted(labels(tmp_path / "out" / "test")) == [0, 0, 2, 2, 2]
    with pytest.raises(InputError, match="its own test set"):
        open_folders(str(tmp_path / "in"), 0.1)
    folders(tmp_path / "in" / "val", {"w": 1})
    with pytest.raises(InputError, match=r"(?s)val/w.*classes that train has"):
        open_folders(str(tmp_path / "in"))


def test_what_is_no_folder_of_classes_is_one_message(tmp_path: Path) -> None:
    root = folders(tmp_path / "in", {"x": 4, "y": 1})
    for name in "ab":
        (tmp_path / "empty" / name).mkdir(parents=True)
    cases: list[tuple[Path, float, str]] = [
        (root / "x", 0.0, "a folder of pictures for each class"),
        (root, 0.2, "leaves every class"),
        (tmp_path / "no", 0.0, "can be read"),
        (tmp_path / "empty", 0.0, "pictures "),
    ]
    for address, share, said in cases:
        with pytest.raises(InputError, match=said):
            open_folders(str(address), share)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(InputError, match="a new or empty folder"):
        build_folders(open_folders(str(root)), str(tmp_path / "out"), Options())
    build_folders(open_folders(str(root)), str(tmp_path / "packed"), Options())
    (root / "zebra").mkdir()
    with pytest.raises(InputError, match="other classes"):
        build_folders(open_folders(str(root)), str(tmp_path / "packed"), Options())


def test_the_command_says_how_many_classes_and_counts_what_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folders(tmp_path / "in", {"x": 6, "y": 6})
    (root / "x" / "broken.png").write_bytes(b"no picture")

    def called(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["raychain", "data", "build", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            guarded(commands)
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    status, out, _ = called(root, "--out", tmp_path / "out", "--test", "0.2")
    assert (status, "2 classes" in out, "task.classes is that number" in out) == (0, True, True), out
    assert "1 of 11 files failed" in out
    status, out, _ = called(root, "--out", tmp_path / "out", "--test", "0.2", "--json")
    assert json.loads(out)["parts"]["test"]["samples"] >= 2
    assert called(root, "--out", tmp_path / "out", "--image-column", "x")[0] == 2
    (tmp_path / "table.csv").write_text("path,caption\nin/x/0.png,a\n")
    assert called(tmp_path / "table.csv", "--out", tmp_path / "o2", "--test", "0.2")[0] == 2
