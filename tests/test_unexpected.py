"""The last-resort handler: three lines, a file that holds what a report needs, no credentials."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, typer
from raychain.cli.program import guarded
app = typer.Typer(pretty_exceptions_enable=False)

@app.command()
def command(address: str, verbose: bool = False) -> None:
    raise KeyError(f"odd thing at {address}")

guarded(app)
"""
ADDRESS = "s3://key:s3cr3t@bucket/x?secret_key=abc"


def call(folder: Path, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-c", PROGRAM, ADDRESS, *arguments]
    path = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | path | environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == ""
    assert "s3cr3t" not in done.stderr
    assert "abc" not in done.stderr
    return done.returncode, done.stderr.splitlines()


def test_an_unforeseen_error_is_three_lines_and_a_file(tmp_path):
    status, lines = call(tmp_path)
    assert status == 1
    assert len(lines) == 3
    assert "KeyError" in lines[0]
    assert "odd thing" in lines[0]
    [file] = tmp_path.iterdir()
    assert str(file) in lines[1]
    assert "report" in lines[2]
    text = file.read_text()
    assert "Traceback" in text
    assert "torch" in text
    assert "bucket/x" in text
    assert "s3cr3t" not in text
    assert "abc" not in text


@pytest.mark.parametrize(("arguments", "environment"), [(["--verbose"], {}), ([], {"RAYCHAIN_DEBUG": "1"})])
def test_the_traceback_is_shown_to_who_asks_for_it(tmp_path, arguments, environment):
    status, lines = call(tmp_path, *arguments, **environment)
    assert status == 1
    assert any("Traceback" in line for line in lines)
    assert "report" in lines[-1]


def test_without_a_folder_for_the_file_the_traceback_is_shown(tmp_path):
    gone = {"TMPDIR": str(tmp_path / "none")}
    from raychain import unexpected

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unexpected.tempfile, "gettempdir", lambda: gone["TMPDIR"])
        patch.setattr(unexpected.Path, "cwd", lambda: tmp_path / "none")
        text = unexpected.describe(RuntimeError("odd"))
    assert "RuntimeError: odd" in text
    assert "no file can be written" in text
    status, lines = call(Path("/proc"))
    assert status == 1
    assert "/proc" not in lines[1]
    Path(lines[1].partition(": ")[2]).unlink()
