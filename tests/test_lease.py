"""One driver at a time holds a lease: real processes, killed and suspended ones, storage that is slow or fails."""

import ctypes
import fcntl
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from raychain.core.storage import Folder
from raychain.lease import Holder, Lease

spawn = multiprocessing.get_context("spawn")


class Alone:
    """What a lease protects: entering fails while another process or thread is inside."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        self.file = self.path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __exit__(self, *_: object) -> None:
        self.file.close()


def compete(root: Path, rounds: int, seed: int, together: Any = None) -> None:
    chance = random.Random(seed)
    if together:
        together.wait()
    for _ in range(rounds):
        with Lease(Folder(f"{root}/store"), "lease", settle_s=0.005, poll_s=0.01) as lease:
            assert lease.acquire()
            with Alone(root / "alone"):
                time.sleep(chance.uniform(0, 0.004))
            assert not lease.lost
            with (root / "rounds").open("a") as file:
                file.write(".")


def hold(root: Path, stale_s: float, exit_when_lost: bool) -> None:
    lease = Lease(Folder(str(root)), "lease", stale_s=stale_s)
    assert lease.acquire()
    (root / "holding").touch()
    while not (exit_when_lost and lease.lost):
        time.sleep(0.01)
    (root / "lost").touch()


def hold_after_the_first_thread(root: Path) -> None:
    threading.Thread(target=hold, args=(root, 60.0, False)).start()
    appears(root / "holding")
    ctypes.CDLL(None).pthread_exit(None)  # of this thread alone


@pytest.fixture
def processes() -> Iterator[list[BaseProcess]]:
    """Started ones; those that still run are killed."""
    started: list[BaseProcess] = []
    yield started
    for process in started:
        process.kill()
        process.join()


def start(processes: list[BaseProcess], target: Any, *arguments: Any) -> BaseProcess:
    process = spawn.Process(target=target, args=arguments, daemon=True)
    process.start()
    processes.append(process)
    return process


def appears(path: Path, within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name} within {within_s} s"
        time.sleep(0.005)


def test_of_processes_that_start_at_once_one_at_a_time_holds_it(tmp_path: Path, processes: list[BaseProcess]) -> None:
    together = spawn.Barrier(4)
    for seed in range(4):
        start(processes, compete, tmp_path, 25, seed, together)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "rounds").stat().st_size == 100
    assert Folder(f"{tmp_path}/store").list("lease") == []


def test_holders_killed_at_any_moment_leave_it_to_the_others(tmp_path: Path, processes: list[BaseProcess]) -> None:
    chance, done = random.Random(1), tmp_path / "rounds"
    victims = [start(processes, compete, tmp_path, 10**6, seed) for seed in range(3)]
    appears(done)
    for victim in victims:
        time.sleep(0.2 + chance.uniform(0, 0.1))
        assert victim.is_alive()
        victim.kill()
    before = done.stat().st_size
    survivor = start(processes, compete, tmp_path, 5, 9)
    survivor.join(30)
    assert survivor.exitcode == 0
    assert done.stat().st_size >= before + 5


def test_a_killed_holder_of_this_machine_is_followed_at_once(tmp_path: Path, processes: list[BaseProcess]) -> None:
    victim = start(processes, hold, tmp_path, 60.0, False)
    appears(tmp_path / "holding")
    waited: list[Holder] = []

    def wait(holder: Holder) -> bool:
        if not waited:
            os.kill(victim.pid or 0, signal.SIGKILL)  # not reaped before the end: a zombie holds nothing
        waited.append(holder)
        return True

    with Lease(Folder(str(tmp_path)), "lease") as lease:
        began = time.monotonic()
        assert lease.acquire(wait)
        assert time.monotonic() - began < 2
        assert (waited[0].pid, waited[0].held) == (victim.pid, True)
        assert str(waited[0]).endswith(f":{victim.pid}")
        assert len(Folder(str(tmp_path)).list("lease")) == 1


def test_a_holder_lives_as_long_as_any_of_its_threads(tmp_path: Path, processes: list[BaseProcess]) -> None:
    holder = start(processes, hold_after_the_first_thread, tmp_path)
    appears(tmp_path / "holding")
    deadline = time.monotonic() + 10
    while Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with Lease(Folder(str(tmp_path)), "lease") as lease:
        answers = iter([True, True, False])
        assert not lease.acquire(lambda _: next(answers))
        holder.kill()
        assert lease.acquire()


def test_a_suspended_holder_is_followed_when_stale_and_knows_it_when_it_goes_on(
    tmp_path: Path, processes: list[BaseProcess]
) -> None:
    sleeper = start(processes, hold, tmp_path, 0.9, True)
    appears(tmp_path / "holding")
    os.kill(sleeper.pid or 0, signal.SIGSTOP)
    with Lease(Folder(str(tmp_path)), "lease", stale_s=0.9) as lease:
        began = time.monotonic()
        assert lease.acquire()
        assert 0.8 < time.monotonic() - began < 5
        os.kill(sleeper.pid or 0, signal.SIGCONT)
        appears(tmp_path / "lost", 5)
        time.sleep(0.3)
        assert not lease.lost
        whole = [name for name in Folder(str(tmp_path)).list("lease") if name.endswith(".json")]
        assert len(whole) == 1, "one that was stopped while it wrote leaves its part beside"


def test_waiting_ends_when_the_caller_no_longer_wants_it(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with Lease(folder, "lease") as held, Lease(folder, "lease") as other, Lease(folder, "another") as unrelated:
        assert held.acquire()
        assert unrelated.acquire()
        answers = iter([True, True, False])
        assert not other.acquire(lambda holder: next(answers))
        assert not held.lost
        held.release()
        assert other.acquire()
        other.release()
        assert held.acquire()


def test_an_error_while_waiting_leaves_no_claim(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with Lease(folder, "lease") as held:
        assert held.acquire()
        with pytest.raises(KeyboardInterrupt), Lease(folder, "lease") as other:
            other.acquire(lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert len(folder.list("lease")) == 1
    assert folder.list("lease") == []


def claim(folder: Folder, name: str, **fields: Any) -> None:
    mine = Lease(folder, "template")
    assert mine.acquire()
    [file] = folder.list("template")
    folder.write_json(f"lease/{name}.json", folder.read_json(f"template/{file}") | fields)
    mine.release()


def test_a_reused_pid_is_another_process(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    claim(folder, "same")
    with Lease(folder, "lease") as lease:
        assert not lease.acquire(lambda holder: holder.pid != os.getpid())
        process = folder.read_json("lease/same.json")["process"]
        claim(folder, "same", process=process.rpartition("/")[0] + "/1")
        assert lease.acquire(lambda holder: False)
        assert "same.json" not in folder.list("lease")


@pytest.mark.parametrize("held", [True, False])
def test_a_claim_of_another_machine_is_dead_when_it_stays_unchanged(tmp_path: Path, held: bool) -> None:
    folder = Folder(str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    claim(folder, "far", process="elsewhere/1", host="elsewhere", pid=ended.pid, held=held)
    seen = []
    with Lease(folder, "lease", stale_s=0.5) as lease:
        began = time.monotonic()
        assert lease.acquire(lambda holder: seen.append(str(holder)) or True)  # type: ignore[func-returns-value]
        assert 0.5 < time.monotonic() - began < 3
        assert set(seen) == {f"elsewhere:{ended.pid}"}


def test_a_claim_that_nobody_can_read_counts_until_it_is_stale(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.write("lease/torn.json", b'{"host": "x"')
    with Lease(folder, "lease", stale_s=0.3) as lease:
        began = time.monotonic()
        assert lease.acquire(lambda holder: holder.held)
        assert time.monotonic() - began > 0.3


def test_a_holder_whose_claim_is_removed_has_lost_it(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with Lease(folder, "lease", stale_s=1.2) as lease:
        assert lease.acquire()
        folder.delete("lease")
        deadline = time.monotonic() + 0.5
        while not lease.lost:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert folder.list("lease") == []


class Store(fs.FileSystemHandler):
    """Objects that appear whole, in a store where every request is served late and answered later."""

    def __init__(self, delay_s: float, seed: int) -> None:
        self.objects: dict[str, bytes] = {}
        self.delay_s, self.chance, self.failing = delay_s, random.Random(seed), False

    def _late(self, act: Any) -> Any:
        time.sleep(self.chance.uniform(0, self.delay_s))
        if self.failing:
            raise OSError("slow down")
        answer = act()
        time.sleep(self.chance.uniform(0, self.delay_s))
        return answer

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        kinds = {True: fs.FileType.File, False: fs.FileType.NotFound}
        return self._late(lambda: [fs.FileInfo(path, kinds[path in self.objects]) for path in paths])

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        prefix = selector.base_dir + "/"
        return self._late(
            lambda: [fs.FileInfo(path, fs.FileType.File) for path in list(self.objects) if path.startswith(prefix)]
        )

    def open_input_stream(self, path: str) -> Any:
        content = self._late(lambda: self.objects.get(path))
        if content is None:
            raise FileNotFoundError(path)
        return pa.PythonFile(io.BytesIO(content), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pa.PythonFile(_Put(self, path), mode="w")

    def delete_file(self, path: str) -> None:
        self._late(lambda: self.objects.pop(path, None))

    def create_dir(self, path: str, recursive: bool) -> None:
        pass

    def get_type_name(self) -> str:
        return "late"

    def normalize_path(self, path: str) -> str:
        return path

    def _unused(self, *_: Any) -> Any:
        raise NotImplementedError

    delete_dir = delete_dir_contents = delete_root_dir_contents = move = copy_file = _unused
    open_input_file = open_append_stream = _unused


class _Put(io.BytesIO):
    def __init__(self, store: Store, path: str) -> None:
        super().__init__()
        self.store, self.path = store, path

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            self.store._late(lambda: self.store.objects.update({self.path: content}))
        super().close()


def folder_of(store: Store) -> Folder:
    folder = Folder("memory://late")
    folder.fs = fs.PyFileSystem(store)
    return folder


def test_storage_that_is_late_never_lets_two_in(tmp_path: Path) -> None:
    """However short the settle time."""
    rounds, errors = [], []
    together = threading.Barrier(5)

    def run(seed: int) -> None:
        try:
            together.wait()
            for _ in range(3):
                with Lease(folder_of(store), "lease", settle_s=0, poll_s=0.005) as lease:
                    assert lease.acquire()
                    with Alone(tmp_path / "alone"):
                        time.sleep(0.003)
                    rounds.append(seed)
        except BaseException as error:
            errors.append(error)

    store = Store(0.01, 3)
    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(rounds) == 15
    assert not store.objects


def test_storage_that_fails_for_a_while_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    store = Store(0, 0)
    store.failing = True
    threading.Timer(0.3, lambda: setattr(store, "failing", False)).start()
    with Lease(folder_of(store), "lease", stale_s=1.8, settle_s=0, poll_s=0.02) as lease:
        assert lease.acquire()
        store.failing = True
        time.sleep(0.5)
        store.failing = False
        time.sleep(0.3)
        assert not lease.lost
    assert "slow down" in caplog.text
    assert not store.objects


def test_a_holder_that_cannot_renew_has_lost_it_before_others_take_it() -> None:
    store = Store(0, 0)
    with Lease(folder_of(store), "lease", stale_s=0.6, settle_s=0, poll_s=0.02) as lease:
        assert lease.acquire()
        store.failing = True
        time.sleep(0.45)
        assert lease.lost
        store.failing = False
        time.sleep(0.1)
        assert lease.lost


@pytest.mark.parametrize("pause", ["before it writes", "while it writes"])
def test_a_claimant_that_was_taken_for_dead_does_not_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: str
) -> None:
    """It sees nobody, then stands still for longer than the stale time before its claim says that it holds."""
    slow, other = (Lease(Folder(str(tmp_path)), "lease", stale_s=0.3, poll_s=0.02) for _ in range(2))
    stands_still = threading.Event()

    def late(action: Any, due: Any) -> Any:
        def act(*arguments: Any, **named: Any) -> Any:
            if due(*arguments, **named) and not stands_still.is_set():
                stands_still.set()
                time.sleep(0.6)
            return action(*arguments, **named)

        return act

    if pause == "before it writes":
        monkeypatch.setattr(slow, "_write", late(slow._write, lambda own, held: held))
    else:
        write = late(slow.folder.write, lambda name, claim: json.loads(claim)["held"])
        monkeypatch.setattr(slow.folder, "write", write)
    got: list[bool] = []
    thread = threading.Thread(target=lambda: got.append(slow.acquire(lambda holder: not holder.held)))
    thread.start()
    stands_still.wait(5)
    with other:
        assert other.acquire()
        thread.join(5)
        assert got == [False]
        assert not other.lost


def test_storage_that_stays_away_and_a_disk_that_cannot_be_written_are_errors(tmp_path: Path) -> None:
    store = Store(0, 0)
    store.failing = True
    with pytest.raises(OSError, match="slow down"):
        Lease(folder_of(store), "lease", stale_s=0.2, settle_s=0, poll_s=0.02).acquire()
    (tmp_path / "lease").write_text("no folder")
    with pytest.raises(OSError, match="lease"):
        Lease(Folder(str(tmp_path)), "lease").acquire()


def test_a_claim_says_whose_it_is(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with Lease(folder, "lease", stale_s=0.6) as lease:
        assert lease.acquire()
        [name] = folder.list("lease")
        first = json.loads(folder.read(f"lease/{name}") or b"")
        assert (first["pid"], first["held"]) == (os.getpid(), True)
        time.sleep(0.2)
        assert folder.read_json(f"lease/{name}")["counter"] > first["counter"]
