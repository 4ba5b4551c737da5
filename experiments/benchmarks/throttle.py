"""Object storage on this machine at a stated speed: moto's S3 server behind a proxy that counts bytes a second."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

CHUNK = 64 * 1024
BUCKET = "bucket"


class Throttle:
    """A TCP proxy on 127.0.0.1 to `target`; what the target answers passes at `rate` bytes a second over all
    connections together.
    """

    def __init__(self, target: tuple[str, int], rate: float) -> None:
        self.target, self.rate = target, rate
        self._free_at, self._lock = time.monotonic(), threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accepts no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.target)
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, slow: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                if slow:
                    self._wait(len(data))
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _wait(self, size: int) -> None:
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + size / self.rate
            pause = self._free_at - time.monotonic()
        if pause > 0:
            time.sleep(pause)


@contextlib.contextmanager
def object_storage(folder: Path, rate: float) -> Iterator[str]:
    """Puts the tars below `folder` into a bucket; yields an address with `{}` in place of the path in it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it prints every request
    with ThreadPoolExecutor(1, initializer=_run_when_idle) as starter:
        server, throttle = starter.submit(_serve, folder, rate).result()
    try:
        yield f"s3://{BUCKET}/{{}}?endpoint_override=127.0.0.1:{throttle.port}&scheme=http"
    finally:
        throttle.close()
        server.stop()


def _run_when_idle() -> None:
    """A real storage's processor time is not this machine's; threads started from this one inherit the priority."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _serve(folder: Path, rate: float) -> tuple[ThreadedMotoServer, Throttle]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ[name] = "none"
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", "us-east-1", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket=BUCKET)
    for path in sorted(folder.rglob("*.tar")):
        client.upload_file(str(path), BUCKET, path.relative_to(folder).as_posix())
    return server, Throttle((host, port), rate)
