"""Wrong input ends with status 2 and one message before Ray starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml

from raychain.cli.program import main
from raychain.cli.run import run_command


def status(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["raychain.run", *arguments])
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    with pytest.raises(SystemExit) as stop:
        main(run_command, "run")
    return int(stop.value.code or 0), capsys.readouterr().err


CASES = {
    "typo": (["--set", "train.global_bath=64"], ["train.global_bath", "did you mean global_batch?"]),
    "typo in the chain": (["--set", "chain.0.modle=x"], ["chain.0.modle", "did you mean model?"]),
    "missing shards": (["--set", "data.train=/nowhere/{00..03}.tar"], ["data.train", "/nowhere/00.tar"]),
    "shrinking chain": (["--set", "chain.0.model=CoM-micro-L"], ["chain.1.model", "CoM-micro-L"]),
    "unknown model": (["--set", "chain.0.model=CoM-micro-X"], ["chain.0.model", "did you mean CoM-micro-"]),
    "batch smaller than the workers": (["--set", "compute.workers=33"], ["train.global_batch", "32 over 33 workers"]),
    "fewest above most workers": (["--set", "compute.workers=[3, 2]"], ["compute.workers", "[min, max]"]),
    "batch larger than the data": (["--set", "train.global_batch=4096"], ["train.global_batch", "1200 samples"]),
    "unknown operator": (["--set", "transfer.width=embedd"], ["transfer.width", "did you mean embed?"]),
    "two units": (["--set", "chain.0.epochs=3 epochs 5 steps"], ["chain.0.epochs", "N steps"]),
    "no such key path": (["--set", "chain.7.epochs=3"], ["chain.7.epochs", "0 to 1"]),
    "no gpu here": (["--set", "compute.gpus_per_worker=1"], ["compute", "--address"]),
    "no zero-shot folder": (["--set", "evaluate.zero_shot=/nowhere"], ["evaluate.zero_shot", "/nowhere"]),
    "warm-up too long": (["--set", "train.warmup=1000 steps"], ["chain.0", "1000 warm-up steps of 24"]),
    "unknown caption suffix": (["--set", "data.captions.keys=[txt|word]"], ["data.captions.keys", "txt|sentences"]),
    "cool-down without wsd": (["--set", "train.cooldown=10 %"], ["train.cooldown", "schedule: wsd"]),
    "bad fraction": (["--set", "data.max_bad_fraction=2"], ["data.max_bad_fraction"]),
    "wrong image size": (["--set", "data.image_size=41"], ["data.image_size", "41"]),
}  # fmt: skip


def test_too_much_unusable_data_is_found_before_ray_starts(tree, tmp_path, capsys, monkeypatch):
    for path in sorted((Path(tree["data"]["train"])).glob("*.tar")):
        with path.open("rb") as whole, (tmp_path / path.name).open("wb") as half:
            half.write(whole.read(path.stat().st_size // 2))
    tree["data"] |= {"train": str(tmp_path), "max_bad_fraction": 0.001}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    code, message = status(capsys, monkeypatch, str(file))
    assert code == 2
    assert "2 truncated shard" in message
    assert "00000.tar" in message
    assert "data.max_bad_fraction" in message
    assert status(capsys, monkeypatch, str(file), "--set", "data.max_bad_fraction=0.1", "--dry-run")[0] == 0


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_message_with_status_2(case, tree, tmp_path, capsys, monkeypatch):
    arguments, expected = CASES[case]
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    code, message = status(capsys, monkeypatch, str(file), *arguments)
    assert code == 2, message
    for part in ("given", "allowed", "fix", *expected):
        assert part in message
    assert "Traceback" not in message


def test_an_unwritable_folder_is_named(tree, tmp_path, capsys, monkeypatch):
    file, blocker = tmp_path / "tiny.yaml", tmp_path / "blocker"
    file.write_text(yaml.safe_dump(tree))
    blocker.write_text("a file where a folder should be")
    code, message = status(capsys, monkeypatch, str(file), "--out", str(blocker / "run"))
    assert code == 2
    assert "--out" in message
    assert str(blocker) in message


def test_a_missing_experiment_names_those_there_are(capsys, monkeypatch):
    code, message = status(capsys, monkeypatch, "demmo")
    assert code == 2
    assert "did you mean demo?" in message
    code, message = status(capsys, monkeypatch, "nowhere/x.yaml")
    assert code == 2
    assert "no such file" in message


def test_dry_run_checks_and_starts_nothing(tree, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "raychain.run", str(file), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CoM-micro-M" in done.stdout
    assert "24 steps" in done.stdout
    assert not (tmp_path / "runs/tiny/run.json").exists()


def test_every_shipped_experiment_is_valid():
    from raychain.config.loading import load_experiment, shipped_experiments
    from raychain.runs.checks import check_experiment
    from raychain.runs.costing import with_chain

    assert {"demo", "demo-quick", "cc3m-vit-tsbl"} <= set(shipped_experiments())
    for name, path in shipped_experiments().items():
        assert isinstance(path, Path)
        check_experiment(with_chain(load_experiment(name)), address="10.0.0.5:6379")
