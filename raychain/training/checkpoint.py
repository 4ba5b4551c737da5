"""Saved states of an unfinished stage: a folder a step, complete once `state.json` is there. All are finite."""

from __future__ import annotations

import errno
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from raychain import records
from raychain.core.storage import Folder
from raychain.records import CheckpointRecord, CountersRecord
from raychain.training.state import Counters, Snapshot, TrainState, all_finite

log = logging.getLogger("raychain.training")
MARKER = "state.json"
WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
CHUNK = 2**24
STEP = re.compile("[0-9]{10}")
ASIDE = re.compile("[0-9a-f]{8,}")
"""What a key looks like, and how the name of a folder ends to which states of another key were moved."""


class Checkpoints:
    """The states of one stage in the folder `name`. Saving copies the state and writes in the background.

    `key` is theirs, or gives that of the state after so many steps. `keep`: how many of a key; None: all. `saved` hears
    of the step of each that is complete.
    """

    def __init__(
        self,
        out: Folder,
        name: str,
        key: str | Callable[[int], str],
        keep: int | None,
        saved: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.out, self.name, self.keep, self.saved = out, name, keep, saved
        self.key_at: Callable[[int], str] = (lambda _: key) if isinstance(key, str) else key
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._buffers: dict[str, torch.Tensor] = {}

    def latest(self, most: int | None = None) -> int | None:
        """Step of the newest sound checkpoint of this stage, of `most` steps where given, or None. Those that are
        damaged or not finite are named and set aside.
        """
        for name in reversed(self._steps()):
            state = self.marker(int(name))
            if state is None or (most is not None and int(name) > most):
                continue
            damage = self._damage(f"{self.name}/{name}", state)
            if damage is None:
                return int(name)
            log.warning("%s is damaged (%s): set aside, an earlier state is used", f"{self.name}/{name}", damage)
            self._move(f"{self.name}/{name}", f"{self.name}/{name}.damaged")
        return None

    def arrange(self, keys: Iterable[str]) -> None:
        """Moves what stages of other keys than `keys`, which are this one's, saved here to `<name>.<first of the key>`,
        and this stage's states from such folders back.
        """
        for name in self._steps():
            key = self._key(f"{self.name}/{name}")
            if key != self.key_at(int(name)) and ASIDE.fullmatch(key):
                self._move(f"{self.name}/{name}", f"{self._aside(key)}/{name}")
        for key in keys:
            aside = self._aside(key)
            for name in self._steps(aside):
                found = self._key(f"{aside}/{name}")
                if found == self.key_at(int(name)) and self.marker(int(name)) is None:
                    self._move(f"{aside}/{name}", f"{self.name}/{name}")

    def marker(self, step: int) -> CheckpointRecord | None:
        """What was noted of that step's state; None if there is none. Its files are not looked at."""
        state = self._marker(f"{self.name}/{step:010d}")
        return state if state is not None and state.key == self.key_at(step) else None

    def _marker(self, folder: str) -> CheckpointRecord | None:
        state, problem = records.examine(self.out, f"{folder}/{MARKER}", CheckpointRecord)
        if state is None and problem:  # `latest` tells of what is wrong with a field
            records.warn(f"{folder}/{MARKER} in {self.out.address} {problem}: the state is not used")
        return state

    def _key(self, folder: str) -> str:
        state = self._marker(folder)
        return state.key if state else ""

    def save(self, state: TrainState, *, wait: bool = False) -> bool:
        """Saves the state; False, and nothing is saved, if it is not finite. While the one before is still being
        written nothing is saved either: training does not wait for storage. A failure to write is logged and training
        goes on. With `wait` it is waited for and raised.
        """
        if not wait and self._pending is not None and not self._pending.done():
            log.warning("the checkpoint before is still being written to %s: none is saved this time", self.out.address)
            return bool(state.finite())
        self.finish()
        finite, snapshot = state.finite(), state.snapshot(self._buffers)  # in this order nothing waits twice for a GPU
        if not finite:
            return False
        self._pending = self._writer.submit(self._write, snapshot)
        if wait:
            self._pending.result()
            self._pending = None
        return True

    def finish(self) -> None:
        """Waits for the write under way."""
        if self._pending is not None:
            try:
                self._pending.result()
            except OSError as error:
                log.warning("checkpoint not saved, training goes on: %s", error)
            self._pending = None

    def load(self, step: int, state: TrainState) -> None:
        """Restores the checkpoint of that step into `state`."""
        with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
            folder = self.out.fetch(f"{self.name}/{step:010d}", Path(scratch) / "checkpoint")
            marker = records.parse((folder / MARKER).read_bytes(), CheckpointRecord)
            assert marker is not None
            assert marker.counters is not None, "`latest` passes such states over"
            state.restore(
                load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER), Counters(**marker.counters.content())
            )

    def clear(self) -> None:
        """Removes all checkpoints of the stage, which is finished, and what was moved aside for them."""
        self.finish()
        parent, _, own = self.name.rpartition("/")
        for name in self.out.list(parent):
            if name == own or (name.startswith(f"{own}.") and ASIDE.fullmatch(name.removeprefix(f"{own}."))):
                self.out.delete(f"{parent}/{name}")

    def _steps(self, folder: str | None = None) -> list[str]:
        return [name for name in self.out.list(folder or self.name) if STEP.fullmatch(name)]

    def _aside(self, key: str) -> str:
        return f"{self.name}.{key[:8]}"

    def _move(self, source: str, target: str) -> None:
        """Renames a state's folder; what is at the target goes."""
        self.out.delete(target)
        self.out.fs.create_dir(self.out.join(target.rpartition("/")[0]), recursive=True)
        self.out.move(source, target, MARKER)

    def _damage(self, name: str, state: CheckpointRecord) -> str | None:
        """What is wrong with a checkpoint's files, or None."""
        files = state.files or {}
        if not {WEIGHTS, OPTIMIZER} <= files.keys():
            return f"{MARKER} does not list its files"
        if state.counters is None or state.counters.step != int(name.rpartition("/")[2]):
            return f"{MARKER} is of another step"
        with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
            try:
                folder = self.out.fetch(name, Path(scratch) / "checkpoint")
                for file in (WEIGHTS, OPTIMIZER):
                    if _digest(folder / file) != files[file]:
                        return f"{file} is not what was written"
                    if (tensor := _not_finite(folder / file)) is not None:  # as versions before this check wrote them
                        return f"{tensor} in {file} is not finite"
            except (OSError, SafetensorError) as error:
                if getattr(error, "errno", None) == errno.ENOSPC:  # the scratch folder's fault
                    raise
                return str(error)
        return None

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.counters.step
        name = f"{self.name}/{step:010d}"
        with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
            folder = Path(scratch)
            try:
                save_file(snapshot.weights, folder / WEIGHTS)
                save_file(snapshot.moments, folder / OPTIMIZER)
                files = {file: _digest(folder / file) for file in (WEIGHTS, OPTIMIZER)}
                marker = CheckpointRecord(
                    key=self.key_at(step), counters=CountersRecord(**asdict(snapshot.counters)), files=files
                )
                (folder / MARKER).write_bytes(marker.document())
                self.out.publish(folder, name, MARKER)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(folder, ignore_errors=True)
                self.out.delete(name)
                raise OSError(str(error)) from error
        self.saved(step)
        if self.keep is not None:
            alike = [n for n in self._steps() if int(n) <= step and self.key_at(int(n)) == self.key_at(step)]
            for old in alike[: -self.keep]:
                self.out.delete(f"{self.name}/{old}")


def _not_finite(path: Path) -> str | None:
    """The first tensor in a safetensors file with numbers that are not finite, or None."""
    with safe_open(path, "pt") as file:
        return next((name for name in file.keys() if not all_finite([file.get_tensor(name)])), None)  # noqa: SIM118


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
