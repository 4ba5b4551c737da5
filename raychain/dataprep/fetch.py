"""One picture's bytes from where a table says it is: http(s) with time limits and retries, storage, or a path."""

from __future__ import annotations

import http.client
import io
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow import fs

from raychain.core.storage import answered, is_local, regular_file, resolve
from raychain.errors import InputError

LARGEST = 2**26
"""Bytes; what is larger is no picture for training."""
TOO_LARGE = f"larger than {LARGEST // 2**20} MiB"
PIECE = 2**16
DEADLINE = 6
"""A whole download may take this many times the time limit of one answer."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
AGENT = "Mozilla/5.0 (compatible; raychain data build)"


class FetchError(Exception):
    """The picture cannot be had; the message says why in a few words."""


class _Retry(Exception):  # noqa: N818 - says what to do
    """Another try may succeed, after `pause` seconds at least."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


def fetch(address: str, folder: str, *, timeout_s: float, retries: int) -> bytes:
    """The content at `address`; relative paths start at `folder`. Raises FetchError."""
    if address.lower().startswith(("http://", "https://")):
        return _download(address, timeout_s, retries)
    if "://" not in address and not Path(address).is_absolute():
        address = f"{folder}/{address}"
    try:
        filesystem, path = resolve(address)
        if isinstance(filesystem, fs.LocalFileSystem):
            return _read(path)
        content = answered(partial(_stored, filesystem, path), address, DEADLINE * timeout_s)
    except FileNotFoundError:
        raise FetchError("no such file") from None
    except (OSError, InputError, ValueError) as error:
        reason = error.args[2] if isinstance(error, InputError) else getattr(error, "strerror", None) or error
        raise FetchError(f"cannot be read{'' if is_local(address) else ' from storage'}: {reason}") from None
    return _bounded(content)


def _stored(filesystem: fs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path, compression=None) as stream:
        return bytes(stream.read(LARGEST + 1))


def _read(path: str) -> bytes:
    """A local file's content. What says that it is empty is not opened: such files of /proc may be endless."""
    found = regular_file(path)
    if found.st_size > LARGEST:
        raise FetchError(TOO_LARGE)
    if not found.st_size:
        return b""
    with open(path, "rb") as file:  # noqa: PTH123 - a string of the filesystem
        return _bounded(file.read(LARGEST + 1))


def _bounded(content: bytes) -> bytes:
    if len(content) > LARGEST:
        raise FetchError(TOO_LARGE)
    return content


def _download(url: str, timeout_s: float, retries: int) -> bytes:
    pause = FIRST_PAUSE_S
    for left in range(retries, -1, -1):
        try:
            return _get(url, timeout_s)
        except _Retry as error:
            if not left:
                raise FetchError(str(error)) from None
            time.sleep(min(max(pause, error.pause), LONGEST_PAUSE_S))
            pause *= 2
    raise AssertionError("the last try returns or raises")


def _get(url: str, timeout_s: float) -> bytes:
    """One try. Raises _Retry for what may pass, FetchError for what will not."""
    quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    parts, size = [], 0
    opener = _opener(time.monotonic() + DEADLINE * timeout_s)
    try:
        request = urllib.request.Request(quoted, headers={"User-Agent": AGENT, "Accept": "image/*,*/*;q=0.5"})  # noqa: S310
        with opener.open(request, timeout=timeout_s) as answer:
            expected = answer.headers.get("Content-Length")
            if expected is not None and expected.isdigit() and int(expected[:20]) > LARGEST:
                raise FetchError(TOO_LARGE)
            while piece := answer.read1(PIECE):
                parts.append(piece)
                size += len(piece)
                if size > LARGEST:
                    raise FetchError(TOO_LARGE)
    except urllib.error.HTTPError as error:
        if error.code in TRANSIENT:
            after = error.headers.get("Retry-After") or ""
            raise _Retry(f"HTTP {error.code}", float(after[:9]) if after.isdecimal() else 0.0) from None
        raise FetchError(f"HTTP {error.code}") from None
    except TimeoutError as error:
        raise _Retry("too slow" if isinstance(error, _TooSlow) else "timed out") from None
    except urllib.error.URLError as error:
        timed_out = isinstance(error.reason, TimeoutError)
        raise _Retry("timed out" if timed_out else f"no connection ({error.reason})") from None
    except (http.client.InvalidURL, UnicodeError, ValueError) as error:
        raise FetchError(f"no valid URL ({error})") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(f"connection broke ({type(error).__name__})") from None
    if expected is not None and expected.isdigit() and int(expected[:20]) != size:
        raise _Retry("connection broke (short answer)")
    return b"".join(parts)


class _TooSlow(TimeoutError):  # noqa: N818 - says what the server is
    """Each answer came in time, and all of them together did not."""


class _Timed(io.RawIOBase):
    """What a socket receives, until a point in time: a byte every few seconds is no answer."""

    def __init__(self, connection: socket.socket, end: float) -> None:
        self._socket, self._end = connection, end
        self._raw: Any = connection.makefile("rb", buffering=0)
        self._limit = connection.gettimeout() or 0.0

    def readinto(self, target: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise _TooSlow
        self._socket.settimeout(min(left, self._limit))
        try:
            return int(self._raw.readinto(target))
        except TimeoutError:
            raise TimeoutError if left > self._limit else _TooSlow from None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to pages of the web, and to nothing else."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith(("http://", "https://")):
            raise FetchError("redirected to what is no web address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(end: float) -> urllib.request.OpenerDirector:
    """Opens http and https, through the environment's proxies; what is opened can be read until `end`."""

    class Answer(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
            super().__init__(sock, *arguments, **options)
            self.fp.close()
            self.fp = io.BufferedReader(_Timed(sock, end))

    class Plain(http.client.HTTPConnection):
        response_class = Answer

    class Secure(http.client.HTTPSConnection):
        response_class = Answer

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, req: Any) -> Any:
            return self.do_open(Plain, req)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, req: Any) -> Any:
            return self.do_open(Secure, req, context=self._context)  # type: ignore[attr-defined]

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        PlainHandler(),
        SecureHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener
