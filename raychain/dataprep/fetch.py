"""One picture's bytes from where a table says it is: http(s) with time limits and retries, storage, or a path."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from raychain.errors import InputError
from raychain.storage import is_local, resolve

LARGEST = 2**26
"""Bytes; what is larger is no picture for training."""
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
        with filesystem.open_input_stream(path, compression=None) as stream:
            return stream.read()
    except FileNotFoundError:
        raise FetchError("no such file") from None
    except (OSError, InputError, ValueError) as error:
        reason = error.args[2] if isinstance(error, InputError) else str(error)
        raise FetchError(f"cannot be read{'' if is_local(address) else ' from storage'}: {reason}") from None


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
    started, parts, size = time.monotonic(), [], 0
    try:
        request = urllib.request.Request(quoted, headers={"User-Agent": AGENT, "Accept": "image/*,*/*;q=0.5"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310 - http and https alone come here
            expected = answer.headers.get("Content-Length")
            while piece := answer.read(PIECE):
                parts.append(piece)
                size += len(piece)
                if size > LARGEST:
                    raise FetchError(f"larger than {LARGEST // 2**20} MiB")
                if time.monotonic() - started > DEADLINE * timeout_s:
                    raise _Retry("too slow")
    except urllib.error.HTTPError as error:
        if error.code in TRANSIENT:
            after = error.headers.get("Retry-After") or ""
            raise _Retry(f"HTTP {error.code}", float(after) if after.isdigit() else 0.0) from None
        raise FetchError(f"HTTP {error.code}") from None
    except TimeoutError:
        raise _Retry("timed out") from None
    except urllib.error.URLError as error:
        timed_out = isinstance(error.reason, TimeoutError)
        raise _Retry("timed out" if timed_out else f"no connection ({error.reason})") from None
    except (http.client.InvalidURL, UnicodeError, ValueError) as error:
        raise FetchError(f"no valid URL ({error})") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(f"connection broke ({type(error).__name__})") from None
    if expected is not None and expected.isdigit() and int(expected) != size:
        raise _Retry("connection broke (short answer)")
    return b"".join(parts)
