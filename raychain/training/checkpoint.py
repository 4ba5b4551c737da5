"""Saved states of an unfinished stage: a folder a step, complete once `state.json` is there."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from raychain.storage import Folder
from raychain.training.state import Snapshot, TrainState

log = logging.getLogger("raychain.training")
MARKER = "state.json"
WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
CHUNK = 2**24


class Checkpoints:
    """The states of one key in the folder `name`. Saving copies the state and writes in the background.

    `keep`: how many; None: all. `saved` hears of the step of each that is complete.
    """

    def __init__(
        self, out: Folder, name: str, key: str, keep: int | None, saved: Callable[[int], None] = lambda _: None
    ) -> None:
        self.out, self.name, self.key, self.keep, self.saved = out, name, key, keep, saved
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._buffers: dict[str, torch.Tensor] = {}

    def latest(self, most: int | None = None) -> int | None:
        """Step of the newest sound checkpoint of this key, of `most` steps where given, or None. Damaged ones are named
        and set aside.
        """
        for name in reversed(self.out.list(self.name)):
            if most is not None and name.isdigit() and int(name) > most:
                continue
            state = self.out.read_json(f"{self.name}/{name}/{MARKER}")
            if not name.isdigit() or not isinstance(state, dict) or state.get("key") != self.key:
                continue
            damage = self._damage(f"{self.name}/{name}", state)
            if damage is None:
                return int(state["counters"]["step"])
            log.warning("%s is damaged (%s): set aside, an earlier state is used", f"{self.name}/{name}", damage)
            self.out.move(f"{self.name}/{name}", f"{self.name}/{name}.damaged")
        return None

    def marker(self, step: int) -> dict[str, Any] | None:
        """What was noted of that step's state; None if there is none. Its files are not looked at."""
        state = self.out.read_json(f"{self.name}/{step:010d}/{MARKER}")
        return state if isinstance(state, dict) and state.get("key") == self.key else None

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Saves the state. While the one before is still being written nothing is saved: training does not wait for
        storage. A failure to write is logged and training goes on. With `wait` it is waited for and raised.
        """
        if not wait and self._pending is not None and not self._pending.done():
            log.warning("the checkpoint before is still being written to %s: none is saved this time", self.out.address)
            return
        self.finish()
        self._pending = self._writer.submit(self._write, state.snapshot(self._buffers))
        if wait:
            self._pending.result()
            self._pending = None

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
            counters = json.loads((folder / MARKER).read_text())["counters"]
            state.restore(load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER), counters)

    def clear(self) -> None:
        """Removes all checkpoints of the stage: it is finished."""
        self.finish()
        self.out.delete(self.name)

    def _damage(self, name: str, state: dict[str, Any]) -> str | None:
        """What is wrong with a checkpoint's files, or None."""
        files = state.get("files")
        if not isinstance(files, dict) or not {WEIGHTS, OPTIMIZER} <= files.keys():
            return f"{MARKER} does not list its files"
        for file in (WEIGHTS, OPTIMIZER):
            try:
                with self.out.fs.open_input_stream(self.out.join(f"{name}/{file}")) as stream:
                    digest = xxhash.xxh3_128()
                    while chunk := stream.read(CHUNK):
                        digest.update(chunk)
            except OSError as error:
                return str(error)
            if digest.hexdigest() != files[file]:
                return f"{file} is not what was written"
        return None

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.counters["step"]
        name = f"{self.name}/{step:010d}"
        with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
            folder = Path(scratch)
            try:
                save_file(snapshot.weights, folder / WEIGHTS)
                save_file(snapshot.moments, folder / OPTIMIZER)
                files = {file: _digest(folder / file) for file in (WEIGHTS, OPTIMIZER)}
                marker = {"key": self.key, "counters": snapshot.counters, "files": files}
                (folder / MARKER).write_text(json.dumps(marker))
                self.out.publish(folder, name, MARKER)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(folder, ignore_errors=True)
                self.out.delete(name)
                raise OSError(str(error)) from error
        self.saved(step)
        if self.keep is not None:
            for old in [name for name in self.out.list(self.name) if name.isdigit()][: -self.keep]:
                self.out.delete(f"{self.name}/{old}")


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
