"""What keeps Ray from starting or from being joined ends in one message, soon."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import raychain
from raychain.backend_ray import address as addresses
from raychain.backend_ray import connection
from raychain.backend_ray.address import Cluster, check_answers, cluster
from raychain.config.loading import validate
from raychain.errors import InputError


@pytest.fixture(autouse=True)
def _no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize("given", [None, "", "local", " local "])
def test_no_address_is_this_machine(given, monkeypatch):
    assert cluster(given) is None
    monkeypatch.setenv("RAY_ADDRESS", given or "")
    assert cluster(None) is None


@pytest.mark.parametrize("given", ["10.0.0.5:6379", "head.example:6379", "[::1]:6379", "auto"])
def test_an_address_of_a_cluster(given, monkeypatch):
    assert cluster(given) == Cluster(given, "--address")
    monkeypatch.setenv("RAY_ADDRESS", given)
    assert cluster(None) == Cluster(given, "RAY_ADDRESS")


@pytest.mark.parametrize(
    "given", ["http://h:8265", "https://h", "ray://h:10001", "10.0.0.5", "h:", ":6379", "h:80", "h:99999", "a b:6379",
              "::1", "redis://h:6379", "h:6379/x"]
)  # fmt: skip
def test_what_is_no_address_is_refused_before_any_work(given, monkeypatch, tree, tmp_path):
    for where, value in (("--address", given), ("RAY_ADDRESS", None)):
        monkeypatch.setenv("RAY_ADDRESS", given)
        with pytest.raises(InputError, match=where):
            cluster(value)
    with pytest.raises(InputError, match="RAY_ADDRESS"):
        raychain.run(validate(tree), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_in_a_submitted_job_the_address_of_the_jobs_api_means_the_jobs_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    monkeypatch.setenv(addresses.IN_A_JOB, "{}")
    assert cluster(None) == Cluster("auto", "RAY_ADDRESS")
    with pytest.raises(InputError, match="jobs API"):
        cluster("http://127.0.0.1:8265")


@contextlib.contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """Something that says `answer` to whoever connects, or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    kept.append(server.accept()[0])
                    if answer is not None:
                        kept[-1].sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"220 smtp.example ESMTP\r\n"])
def test_something_else_that_listens_is_no_cluster(answer, monkeypatch, tree):
    monkeypatch.setattr(addresses, "ANSWERS_S", 0.5)
    began = time.monotonic()
    with listening(answer) as place, pytest.raises(InputError, match="a Ray cluster that answers"):
        check_answers(Cluster(place, "--address"))
    assert time.monotonic() - began < 5


def test_a_port_where_nobody_listens_and_a_host_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for place in (f"127.0.0.1:{port}", "no-such-host.invalid:6379", f"{'x' * 80}.invalid:6379"):
        with pytest.raises(InputError, match="answers"):
            check_answers(Cluster(place, "--address"))


def test_a_cluster_answers(ray_session):
    import ray

    check_answers(Cluster(ray.get_runtime_context().gcs_address, "--address"))


@pytest.mark.parametrize("folder", ["short", "x" * 80, "file", "closed", "missing/below/it"])
def test_rays_folder_is_one_that_holds_its_sockets(folder, monkeypatch, tmp_path):
    place = tmp_path / folder
    if folder == "file":
        place.write_text("")
    elif folder == "closed":
        place = Path("/proc/1")
    elif "/" not in folder:
        place.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(place))
    chosen = Path(connection.temporary())
    assert len(os.fsencode(chosen)) <= connection.LONGEST
    (chosen / "try").write_text("")
    (chosen / "try").unlink()


def test_without_any_such_folder_the_message_names_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("y" * 90)))
    monkeypatch.setattr(connection, "_holds_files", lambda *_: False)
    with pytest.raises(InputError, match="RAY_TMPDIR"):
        connection.temporary()


def test_a_home_that_cannot_be_written_gives_the_instance_a_token_of_its_own(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    for home in ("/proc/1", str(tmp_path / "file")):
        monkeypatch.setenv("HOME", home)
        assert len(connection._token()["RAY_AUTH_TOKEN"]) == 64
    monkeypatch.setenv("HOME", str(tmp_path))
    assert connection._token() == {}
