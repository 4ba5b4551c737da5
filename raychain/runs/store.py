"""Finished stages: whether one is whole, moving a damaged one out of the way, and the store that runs share.

A stage folder is complete when it has `stage.json`, which is written last and names the SHA-256 of every other file.
The store holds the same under `store/<key>/`, where the key is the hash of all that determines the stage's result.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from raychain import records
from raychain.core.finite import FiniteScan
from raychain.core.storage import SCRATCH, Folder
from raychain.lease import STALE_S, Lease
from raychain.records import MeasuredRecord, StageRecord
from raychain.training.artifact import OPTIMIZER, PROJECTOR
from raychain.training.finished import STAGE_RECORD

log = logging.getLogger("raychain.runs")

WEIGHTS = ".safetensors"
STORE = "store"
"""The store's subfolder of the storage."""
BESIDE = (PROJECTOR, OPTIMIZER)
"""Weights that are not the model's."""


class UnusableStageError(Exception):
    """A stage folder that says it is complete and must not be used: what is wrong with it."""


class ForeignStageError(UnusableStageError):
    """A complete stage of another key, which is `key`."""

    def __init__(self, key: str) -> None:
        super().__init__(f"holds the stage {key}")
        self.key = key


def verify(folder: Folder, name: str, key: str) -> StageRecord | None:
    """The record of the stage folder `name` if it is the stage `key`, complete, and every file is the one recorded.

    Weights and moments that are not finite are damage too. None if there is no complete stage. Reads every listed file
    once, and none that is not listed. Raises ForeignStageError for another key, UnusableStageError for damage, OSError
    where the folder cannot be read.
    """
    record = _record(folder, name, key)
    for file, digest in (record.files or {}).items() if record else ():
        scan = FiniteScan()
        try:
            found = folder.sha256(f"{name}/{file}", scan.feed)
        except FileNotFoundError:
            raise UnusableStageError(f"{file} is missing") from None
        _check_content(file, found, digest, scan)
    return record


def set_aside(folder: Folder, name: str, why: UnusableStageError) -> str:
    """Renames the stage folder `name` and returns its new name; nothing in it is changed.

    It becomes `<name>.<first of its key>` if it is another's, else `<name>.damaged-<n>`.
    """
    parent, _, base = name.rpartition("/")
    taken = set(folder.list(parent))
    if isinstance(why, ForeignStageError):
        tail = _plain(why.key[:8]) or "other"
        names = (f"{base}.{tail}{f'-{n}' if n > 1 else ''}" for n in range(1, len(taken) + 2))
    else:
        names = (f"{base}.damaged-{n}" for n in range(1, len(taken) + 2))
    free = next(new for new in names if new not in taken)
    target = f"{parent}/{free}" if parent else free
    folder.move(name, target, STAGE_RECORD)
    log.warning("%s in %s: %s; kept as %s", name, folder.address, why, target)
    return target


def usable(folder: Folder, name: str, key: str) -> StageRecord | None:
    """The record of the stage folder `name` if it is the stage `key` and whole, else None, and nothing is left there:
    another stage and a damaged one are set aside, an incomplete one is deleted. Raises OSError.
    """
    try:
        record = verify(folder, name, key)
    except UnusableStageError as why:
        set_aside(folder, name, why)
        return None
    if record is None:
        folder.delete(name)
    return record


class StageStore:
    """The finished stages of a storage, by key: `<storage>/store/<key>/`. Safe to share between drivers.

    `stale_s`: seconds after which a driver on another machine that crashed while it contributed is in nobody's way.
    """

    def __init__(self, storage: Folder, *, stale_s: float = STALE_S) -> None:
        self.storage, self.stale_s = storage, stale_s

    def has(self, key: str) -> bool:
        """Whether the stage is there; its files are not looked at."""
        try:
            return _record(self.storage, f"{STORE}/{key}", key) is not None
        except UnusableStageError:
            return False

    def training(self, key: str) -> Lease:
        """Held by the driver that trains the stage."""
        return Lease(self.storage, f"{STORE}/.training/{key}", stale_s=self.stale_s)

    def adopt(
        self, key: str, run_folder: Folder, name: str, own: Mapping[str, Any] | None = None
    ) -> StageRecord | None:
        """Makes the run folder's `stages/<name>` from the store; its record, or None where the store has no such stage.

        What the run folder has there stays if it is that stage; another or a damaged one is set aside, an incomplete
        one replaced. `checkpoint` of the record is the run's, and so are the fields in `own`. A crash leaves an
        incomplete folder. A stage that is damaged in the store is set aside there. Raises OSError.
        """
        target = f"stages/{name}"
        try:
            if (record := verify(run_folder, target, key)) is not None:
                return record
        except UnusableStageError as why:
            set_aside(run_folder, target, why)
        entry = f"{STORE}/{key}"
        try:
            if (record := _record(self.storage, entry, key)) is None:
                return None
            record = StageRecord.of(record.content() | {"checkpoint": target} | dict(own or {}))
            run_folder.delete(target)
            _copy(self.storage, entry, run_folder, target, record)
        except UnusableStageError:
            run_folder.delete(target)
            self._set_aside(key)
            return None
        records.write(run_folder, f"{target}/{STAGE_RECORD}", record)
        return record

    def contribute(self, key: str, run_folder: Folder, name: str) -> bool:
        """Copies the run folder's finished `stages/<name>` into the store; False if it is there and whole already.

        Of several at once, one copies and the others wait. What a crashed one left is completed. Raises OSError, and
        UnusableStageError if the run folder's stage is not there, damaged or another's: the store has nothing new then.
        """
        source, entry = f"stages/{name}", f"{STORE}/{key}"
        record = _record(run_folder, source, key)
        if record is None:
            raise UnusableStageError(f"{source} in {run_folder.address} is not complete")
        if self._whole(key):
            return False
        with self._lease(key) as lease:
            lease.acquire()
            if self._clear(key):
                return False
            _copy(run_folder, source, self.storage, entry, record)
            if lease.lost:
                raise OSError(f"{entry} in {self.storage.address}: not completed, as the storage was away for too long")
            records.write(self.storage, f"{entry}/{STAGE_RECORD}", record)
        return True

    def rename(self, former: str, record: StageRecord) -> None:
        """Makes the stage of `record`, which names its key, of the files of the stage `former`, which stays.

        Raises OSError, and UnusableStageError where a file is not what the record says.
        """
        key = record.key
        with self._lease(key) as lease:
            lease.acquire()
            if not self._clear(key):
                _copy(self.storage, f"{STORE}/{former}", self.storage, f"{STORE}/{key}", record)
                records.write(self.storage, f"{STORE}/{key}/{STAGE_RECORD}", record)

    def add_results(self, key: str, evaluations: Mapping[str, MeasuredRecord]) -> None:
        """Adds what was measured of a stage that is there to its record; what it knows of other data stays."""
        entry = f"{STORE}/{key}"
        with self._lease(key) as lease:
            lease.acquire()
            record = _record(self.storage, entry, key)
            if record is None:
                return
            known = record.evaluations or {}
            if any(known.get(digest) != found for digest, found in evaluations.items()):
                record.evaluations = {**known, **evaluations}
                records.write(self.storage, f"{entry}/{STAGE_RECORD}", record)

    def _whole(self, key: str) -> bool:
        try:
            return verify(self.storage, f"{STORE}/{key}", key) is not None
        except UnusableStageError:
            return False

    def _clear(self, key: str) -> bool:
        """Whether the stage is whole; if not, there is room for it. Only with the key's lease."""
        entry = f"{STORE}/{key}"
        try:
            if verify(self.storage, entry, key) is not None:
                return True
        except UnusableStageError as why:
            set_aside(self.storage, entry, why)
        for file in self.storage.list(entry):
            if file.endswith(SCRATCH):
                self.storage.remove(f"{entry}/{file}")
        return False

    def _set_aside(self, key: str) -> None:
        """Sets the stage aside in the store, unless another driver has meanwhile."""
        try:
            with self._lease(key) as lease:
                lease.acquire()
                self._clear(key)
        except OSError as error:
            log.warning("%s/%s in %s is damaged, not used, and cannot be set aside: %s", STORE, key,
                        self.storage.address, error)  # fmt: skip

    def _lease(self, key: str) -> Lease:
        return Lease(self.storage, f"{STORE}/.leases/{key}", stale_s=self.stale_s)


def _record(folder: Folder, name: str, key: str) -> StageRecord | None:
    """The record of a complete stage `key`, its files not looked at; None if there is none."""
    record, problem = records.examine(folder, f"{name}/{STAGE_RECORD}", StageRecord)
    if record is None:
        if problem:
            raise UnusableStageError(f"{STAGE_RECORD} {problem}")
        return None
    if problem:
        records.warn(f"{name}/{STAGE_RECORD} in {folder.address} {problem}")
    if record.key != key:
        raise ForeignStageError(record.key)
    files = record.files
    if files is None:
        raise UnusableStageError(f"{STAGE_RECORD} lists no files and checksums")
    if strange := [file for file in files if file != _plain(file) or file == STAGE_RECORD]:
        raise UnusableStageError(f"{STAGE_RECORD} lists {strange[0]!r}, which is no plain file name")
    if not any(file.endswith(WEIGHTS) and file not in BESIDE for file in files):
        raise UnusableStageError(f"{STAGE_RECORD} does not list a model's weights")
    if not any(file.endswith(".json") for file in files):
        raise UnusableStageError(f"{STAGE_RECORD} does not list a model's configuration")
    if unlisted := [file for file in folder.list(name) if file.endswith(WEIGHTS) and file not in files]:
        raise UnusableStageError(f"{unlisted[0]} is not listed in {STAGE_RECORD}")
    return record


def _copy(source: Folder, name: str, target: Folder, target_name: str, record: StageRecord) -> None:
    """Copies the files that the record lists, not the record itself. Raises UnusableStageError where one differs."""
    for file, digest in (record.files or {}).items():
        scan = FiniteScan()
        try:
            found = source.copy_file(f"{name}/{file}", target, f"{target_name}/{file}", scan.feed)
        except FileNotFoundError:
            raise UnusableStageError(f"{file} is missing") from None
        _check_content(file, found, digest, scan)


def _check_content(file: str, found: str, recorded: str, scan: FiniteScan) -> None:
    """UnusableStageError for a file of another checksum than the recorded one, or of weights that are not finite."""
    if found != recorded:
        raise UnusableStageError(f"{file} is damaged (SHA-256 {found[:12]}…, recorded {recorded[:12]}…)")
    if scan.problem is not None:
        raise UnusableStageError(f"{file} is of no use: {scan.problem}")


def _plain(name: str) -> str:
    """The name without what is not of a plain file name."""
    return "".join(c for c in name if c.isalnum() or c in "._-").lstrip(".")
