"""The wheel and the sdist: what is in them, and that they start on a machine that has nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    out = tmp_path_factory.mktemp("dist")
    script = (
        "import os, sys; from hatchling.build import build_sdist, build_wheel; os.chdir(sys.argv[1]);"
        " build_wheel(sys.argv[2]); build_sdist(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, str(ROOT), str(out)], check=True, capture_output=True)
    return out


def interpreter(version: str) -> str | None:
    """An interpreter of the version with the module venv, where this machine has one."""
    kept = Path("~/.pyenv/versions").expanduser().glob(f"{version}*/bin/python")
    asks = "import sys, venv; print(*sys.version_info[:2], sep='.')"
    for place in filter(None, (shutil.which(f"python{version}"), *map(str, kept))):
        said = subprocess.run([place, "-c", asks], capture_output=True, text=True)
        if said.returncode == 0 and said.stdout.strip() == version:
            return place
    return None


def test_wheel_and_sdist_hold_what_a_run_needs(built: Path) -> None:
    [wheel], [sdist] = built.glob("*.whl"), built.glob("*.tar.gz")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "raychain/experiments/demo-quick.yaml",
        "raychain/experiments/evaluation/vtab-plus.yaml",
        "raychain/models/model_configs/CoM-micro-S.json",
        "raychain/pages/page.css",
        "raychain/pages/page.js",
        "raychain/pages/live.js",
        "raychain/py.typed",
    ):
        assert name in inside, name
    assert not any("__pycache__" in name or name.startswith("tests/") for name in inside)
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "raychain/__init__.py", "experiments/demo-quick.yaml"} <= names


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_demo_starts_from_the_wheel_in_a_bare_environment(built: Path, tmp_path: Path, version: str) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    [wheel] = built.glob("*.whl")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    own = tmp_path / "venv/bin"
    subprocess.run([own / "python", "-m", "pip", "install", "-q", f"{wheel}[demo]"], check=True)
    shown = subprocess.run([own / "raychain", "doctor"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout
    command = [own / "raychain", "run", "demo-quick", "--set", "compute.workers=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs/demo-quick/report.html").is_file()
