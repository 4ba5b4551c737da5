"""Saved states of an unfinished stage: `checkpoints/<stage>/<step>/`, complete once `state.json` is there."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from raychain.storage import Folder
from raychain.training.state import TrainState

log = logging.getLogger("raychain.training")
MARKER = "state.json"


class Checkpoints:
    """The checkpoints of one stage in the run folder. Saving copies the state and writes in the background."""

    def __init__(self, out: Folder, stage_folder: str, key: str, keep: int) -> None:
        self.out, self.name, self.key, self.keep = out, f"checkpoints/{stage_folder}", key, keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint of this stage key, or None."""
        for name in reversed(self.out.list(self.name)):
            state = self.out.read_json(f"{self.name}/{name}/{MARKER}")
            if isinstance(state, dict) and state.get("key") == self.key:
                return int(state["counters"]["step"])
        return None

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Saves the state. A failure to write is logged and training goes on; with `wait` it is raised."""
        self.finish()
        self._pending = self._writer.submit(self._write, *state.snapshot())
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
            state.restore(
                load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors"), counters
            )

    def clear(self) -> None:
        """Removes all checkpoints of the stage: it is finished."""
        self.finish()
        self.out.delete(self.name)

    def _write(
        self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], counters: dict[str, Any]
    ) -> None:
        name = f"{self.name}/{counters['step']:010d}"
        with tempfile.TemporaryDirectory(prefix="raychain-") as scratch:
            folder = Path(scratch)
            save_file(weights, folder / "model.safetensors")
            save_file(moments, folder / "optimizer.safetensors")
            (folder / MARKER).write_text(json.dumps({"key": self.key, "counters": counters}))
            try:
                self.out.publish(folder, name, MARKER)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                self.out.delete(name)
                raise
        for old in self.out.list(self.name)[: -self.keep]:
            self.out.delete(f"{self.name}/{old}")
