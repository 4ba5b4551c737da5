"""The page of a run under way, served on this machine alone until the run ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from raychain.core.storage import Folder
from raychain.errors import InputError, one_line
from raychain.pages.loading import read
from raychain.pages.page import ENDED, page
from raychain.pages.worth import beside

HERE = "127.0.0.1"
HOSTS = ("127.0.0.1", "localhost", "::1")
"""Names by which a browser on this machine may ask, so that no other page's name leads here."""
FRESH_S = 1.5
"""How old a page may be that is served."""
LINGER_S = 6.0
"""How long the last page is served, so that whoever looks gets it."""


class _Page:
    """The latest page of a folder."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._text, self._made = b"", -FRESH_S
        self.ended = False

    def text(self) -> bytes:
        """The page, made anew if it is old. What cannot be read for a moment leaves the page as it was."""
        with self._lock:
            if not self.ended and time.monotonic() - self._made >= FRESH_S:
                try:
                    self._text = self._make()
                except (OSError, InputError):
                    if not self._text:
                        raise
                self._made = time.monotonic()
            return self._text

    def _make(self) -> bytes:
        run, search = read(self._folder)
        running = [record.status == "running" for record in (run.record if run else None, search) if record is not None]
        ended = not any(running)
        live = (ENDED[0] if run else ENDED[1]) if ended else f"Live, looked at last at {time.strftime('%H:%M:%S')}."
        text = page(run, search, beside(self._folder, run), live).encode()
        self.ended = ended
        return text


def follow(address: str, port: int, say: Callable[[str], None]) -> None:
    """Serves the page of the run or search in a folder until it ends.

    `say` hears where. Raises InputError for a folder without either, and for a port that is taken.
    """
    folder = Folder(address)
    shown = _Page(folder)
    shown.text()
    if not shown.ended:
        try:
            server = ThreadingHTTPServer((HERE, port), _handler(shown))
        except (OSError, OverflowError) as error:
            raise InputError("--port", port, "a free port of this machine, or 0 for any", str(error)) from None
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, name="page", daemon=True)
        thread.start()
        try:
            at = f"http://{HERE}:{server.server_address[1]}/"
            say(f"{at} shows {one_line(address)} until it ends (Ctrl-C: stop showing)")
            while not shown.ended:
                time.sleep(FRESH_S)
                shown.text()
            time.sleep(LINGER_S)
        finally:
            server.shutdown()
            server.server_close()


def _handler(shown: _Page) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers with the page, and with nothing else."""

        server_version, sys_version = "raychain", ""

        def do_GET(self) -> None:
            if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in HOSTS:
                self.send_error(HTTPStatus.FORBIDDEN)
            elif self.path != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
            else:
                content = shown.text()
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are nobody's news."""

    return Handler
