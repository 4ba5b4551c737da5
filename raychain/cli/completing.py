"""What the shell completes: names that are known without importing torch or open_clip, and files."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from raychain.schema.yaml_text import PACKAGE, shipped


def experiments(incomplete: str) -> list[str]:
    """Shipped experiments, and YAML files and folders by their beginning."""
    return [name for name in shipped() if name.startswith(incomplete)] + _paths(incomplete, (".yaml", ".yml"))


def models(incomplete: str) -> list[str]:
    """Names of raychain's models and of open_clip's."""
    spec = find_spec("open_clip")
    folders = [PACKAGE / "models/model_configs"]
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent / "model_configs")
    names = [path.stem for folder in folders for path in sorted(folder.glob("*.json"))]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    """Folders by their beginning."""
    return _paths(incomplete, ())


def _paths(incomplete: str, endings: tuple[str, ...]) -> list[str]:
    folder, slash, beginning = incomplete.rpartition("/")
    try:
        inside = sorted(Path(folder + slash or ".").iterdir())
    except OSError:
        return []
    found = []
    for path in inside:
        hidden = path.name.startswith(".") and not beginning.startswith(".")
        if path.name.startswith(beginning) and not hidden and (path.is_dir() or path.suffix in endings):
            found.append(folder + slash + path.name + ("/" if path.is_dir() else ""))
    return found
