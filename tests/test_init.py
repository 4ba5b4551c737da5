"""`raychain init`: what shards hold, and an experiment file that a run takes."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from raychain.cli import app
from raychain.config import load_experiment
from raychain.starting.probe import probe


def run(*arguments: str) -> int:
    """The exit status of a command in this process."""
    with pytest.raises(SystemExit) as stop:
        app(arguments)
    return int(stop.value.code or 0)


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def picture(width: int = 48, height: int = 32) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(out, "JPEG")
    return out.getvalue()


def test_a_written_file_passes_the_dry_run(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init", "mine.yaml", "--data", str(demo / "train"), "--gpus", "0", "--budget", "80 %") == 0
    said = capsys.readouterr()
    assert "captions in txt: 1 each" in said.err
    assert "speed-up" in said.out
    experiment = load_experiment("mine.yaml")
    assert experiment.name == "mine"
    assert experiment.data.captions.keys[:2] == ("txt", "json.captions")
    assert experiment.allocation is not None
    assert str(experiment.allocation.budget) == "80 %"
    assert set(experiment.evaluate.named) == {"zero_shot", "retrieval"}, "they lie beside the training shards"
    cache = f"preload.cache={tmp_path / 'cache'}"
    assert run("run", "mine.yaml", "--dry-run", "--set", cache) == 0
    before = Path("mine.yaml").read_text()
    assert run("init", "mine.yaml", "--data", str(demo / "train")) == 2
    assert "none is overwritten" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == before


def test_a_chain_of_ones_own(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stages = ("--chain", "CoM-micro-S:3", "--chain", "CoM-micro-M:20 steps")
    assert run("init", "--data", str(demo / "train"), "--workers", "1", *stages, "--name", "own") == 0
    experiment = load_experiment("experiment.yaml")
    assert [(s.model, str(s.epochs)) for s in experiment.chain] == [
        ("CoM-micro-S", "3 epochs"),
        ("CoM-micro-M", "20 steps"),
    ]
    assert experiment.name == "own"


def test_wrong_answers_leave_no_file(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ("--data", str(demo / "train"))
    for arguments, said in [
        ((), "--data"),
        ((*data, "--family", "CoM-micro-{S,X}"), "family"),
        ((*data, "--paradigm", "clap"), "did you mean clip"),
        ((*data, "--gpus", "1", "--workers", "2"), "--workers"),
        ((*data, "--budget", "0.001 %"), "budget"),
        ((*data, "--task", "classes"), "--task"),
        ((*data, "--task", "classes=10"), "classes"),
        (("--data", str(tmp_path / "none")), "--data"),
    ]:
        assert run("init", *arguments) == 2, arguments
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_found_in_shards(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(6):
        said = {
            "caption": f"a thing {i}", "url": "https://example.org/a b", "exif": '{"a b": 1}',
            "long": f"There is a red thing. It is number {i}. Nobody sees it.", "more": ["one thing", "two things"],
        }  # fmt: skip
        members |= {
            f"{i:03}.jpg": picture(),
            f"{i:03}.txt": f"a thing {i}".encode(),
            f"{i:03}.json": json.dumps(said).encode(),
        }
    held = probe([str(shard(tmp_path / "a.tar", members))])
    assert (held.samples, held.read, held.pictures, held.side, held.classes) == (6, 6, 6, 32, 0)
    assert [key.name for key in held.keys] == ["txt", "json.long|sentences", "json.more"]
    assert [key.captions for key in held.keys] == [1, 3, 2]


def test_a_classifier_is_begun_with_its_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        members = {f"{i:03}.{kind}": c for i in range(40) for kind, c in (("jpg", picture()), ("cls", b"%d" % (i % 3)))}
        shard(tmp_path / part / "0.tar", members)
    arguments = ("--paradigm", "classify", "--data", "train", "--family", "CoM-micro-DeiT-{S,M}", "--workers", "1")
    assert run("init", *arguments) == 2, "nobody said how many classes there are"
    Path("classnames.txt").write_text("a\nb\nc\n")
    assert run("init", *arguments) == 0
    experiment = load_experiment("experiment.yaml")
    assert experiment.task.model_dump()["classes"] == 3
    assert list(experiment.evaluate.named) == ["held-out"]
    assert run("run", "experiment.yaml", "--dry-run", "--set", f"preload.cache={tmp_path / 'cache'}") == 0


def test_names_with_dots_are_taken_up_to_the_last(tmp_path: Path) -> None:
    members = {f"{i}.v1.{kind}": content for i in range(3) for kind, content in (("jpg", picture()), ("txt", b"a b"))}
    held = probe([str(shard(tmp_path / "a.tar", members))])
    assert (held.key_split, held.pictures) == ("last", 3)


def test_samples_are_estimated_from_the_shards_sizes(tmp_path: Path) -> None:
    content = picture()
    for name in "abc":
        members = {f"{name}{i:04}.{kind}": c for i in range(500) for kind, c in (("jpg", content), ("txt", b"a b"))}
        shard(tmp_path / "many" / f"{name}.tar", members)
    held = probe([str(tmp_path / "many")])
    assert held.read == 400
    assert held.samples == pytest.approx(1500, rel=0.05)


def test_questions_are_asked_on_a_terminal(demo: Path, tmp_path: Path) -> None:
    main, side = pty.openpty()
    command = [sys.executable, "-m", "raychain", "init", "asked.yaml", "--data", str(demo / "train")]
    process = subprocess.Popen(command, stdin=side, stdout=subprocess.PIPE, stderr=side, cwd=tmp_path)
    os.close(side)
    os.write(main, b"0\n1\nCoM-micro-{S,M}\n4\n\n\n\n")
    out, _ = process.communicate(timeout=120)
    shown = os.read(main, 2**16).decode()
    os.close(main)
    assert process.returncode == 0, shown
    assert "Models to choose a chain from" in shown
    assert b"speed-up" in out
    experiment = load_experiment(str(tmp_path / "asked.yaml"))
    assert experiment.family == ("CoM-micro-{S,M}",)
    assert experiment.compute.workers == 1
    assert experiment.allocation is not None
    assert experiment.allocation.first == 4
