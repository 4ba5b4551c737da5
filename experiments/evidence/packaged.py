"""Data for the studies out of what Debian packages ship, in train, validation and test.

    python experiments/evidence/packaged.py text FOLDER WORK/data/text          # FOLDER: of python3.11-doc
    python experiments/evidence/packaged.py pictures FOLDER WORK/data/pictures  # FOLDER: of openclipart-png

`apt-get download PACKAGE; dpkg -x PACKAGE*.deb FOLDER` unpacks a package without installing it. Which part a text or a
picture belongs to follows from its name in the package. Texts are the pages' sources, a document each (licence: PSF).
Pictures (public domain) are those of the folders that hold enough of them themselves, on white; a class is a folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import defaultdict
from pathlib import Path

from PIL import Image

from raychain.dataprep.build import Options
from raychain.dataprep.folders import build_folders, open_folders

PARTS = ("train", "validation", "test")
HELD_OUT_TEXT = 0.03  # of the pages, for each of validation and test
HELD_OUT_PICTURES = 0.2
LEAST, MOST = 44, 150  # pictures of a class; the stars alone are more than a thousand
SIDE = 48
LARGEST = 2**24  # pixels; some posters have hundreds of millions
LEFT_OUT = ("unsorted",)


def share(name: str) -> float:
    """A number in [0, 1) that follows from the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def make_text(folder: Path, out: Path) -> dict[str, int]:
    """JSON lines of each part; returns their bytes of text."""
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    for page in sorted(folder.rglob("_sources/**/*.rst.txt")):
        drawn = share(page.as_posix().rpartition("_sources/")[2]) / HELD_OUT_TEXT
        part = "validation" if drawn < 1 else "test" if drawn < 2 else "train"
        found[part].append(page.read_text(encoding="utf-8"))
    for part, texts in found.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (out / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    return {part: sum(len(text.encode()) for text in texts) for part, texts in found.items()}


def make_pictures(folder: Path, out: Path) -> dict[str, int]:
    """Shards of each part: OUT/train, OUT/validation and OUT/test; returns their pictures and the classes."""
    Image.MAX_IMAGE_PIXELS = None
    root = next(path for path in folder.rglob("png") if path.is_dir())
    of: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*.png")):
        with Image.open(path) as opened:
            if opened.width * opened.height <= LARGEST:
                of[path.parent.relative_to(root).as_posix()].append(path)
    kept = {name: paths for name, paths in of.items() if len(paths) >= LEAST and name not in LEFT_OUT}
    for name, paths in kept.items():
        chosen = sorted(paths, key=lambda path: share(f"chosen/{name}/{path.name}"))[:MOST]
        held = round(HELD_OUT_PICTURES * len(chosen))
        for place, path in enumerate(sorted(chosen, key=lambda path: share(f"{name}/{path.name}"))):
            part = "validation" if place < held else "test" if place < 2 * held else "train"
            _small(path, out / "pictures" / part / name.replace("/", "-") / path.name)
    counts = {"classes": len(kept)}
    for part in PARTS:
        built = build_folders(open_folders(str(out / "pictures" / part)), str(out / part), Options())
        counts[part] = built["parts"]["train"]["rows"]
    return counts


def _small(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    page = Image.new("RGBA", (SIDE, SIDE), "white")
    page.alpha_composite(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    page.convert("RGB").save(to)


def main() -> None:
    """Makes one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["text", "pictures"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    made = make_text if given.kind == "text" else make_pictures
    print(json.dumps(made(given.folder, given.out)))


if __name__ == "__main__":
    main()
