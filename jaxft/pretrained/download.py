"""Downloads a file once: resumes interrupted downloads and verifies the checksum before the final rename.

The partial file NAME.partial outlives the process, unlike those of files.atomic_write, so that the next one resumes.
A server is not trusted: it must answer over HTTP or HTTPS, within a time, at a minimum rate and with a bounded size.
"""

import errno
import hashlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urljoin, urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from filelock import FileLock, Timeout
from tqdm import tqdm

from jaxft import interrupts
from jaxft.errors import UserError, on_terminal, printable, write_message
from jaxft.files import open_regular, reason

TIMEOUT_SECONDS = 10.0  # to connect, and between two chunks of the response
TRIES = 3  # in a row without any new bytes
PAUSE_SECONDS = 0.5  # before the second try, and twice that before the third
ANSWER_SECONDS = 30.0  # from a request to the end of the response's headers, redirects included
RATE_SECONDS = 30.0  # in which at least this many bytes must arrive, over all tries:
RATE_BYTES = 100_000
MAX_BYTES = 2_000_000_000  # of a file whose size is unknown
MAX_REDIRECTS = 5
_TRANSIENT = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)  # and 500 to 599
_CHUNK = 1 << 18


class _InterruptedError(Exception):
    """A failure of the network or the server that may be temporary."""


class _FailedError(Exception):
    """A failure that another try would not fix."""


def fetch(url: str, sha256_prefix: str, folder: Path, max_bytes: int = MAX_BYTES) -> Path:
    """Returns the file in `folder`, downloading it unless it is there with the right SHA-256.

    Processes that need the same file wait for the first one's download. Raises UserError, also for a download of more
    than `max_bytes`.
    """
    path = folder / PurePosixPath(urlsplit(url).path).name
    try:
        if not _is_right(path, sha256_prefix):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                if not _is_right(path, sha256_prefix):  # by now another process may have fetched it
                    _fetch(url, sha256_prefix, path, max_bytes)
    except _FailedError as error:
        replacing = ", replacing the wrong one" if path.exists() else ""
        raise UserError(
            f"{url}: {error}; try again, or put the file into {folder}{replacing} (SHA-256 {sha256_prefix}...)"
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free some space, and the same command resumes the download" if full else ""
        raise UserError(f"{path} cannot be read or written: {reason(error)}{remedy}") from error
    return path


def _is_right(path: Path, sha256_prefix: str) -> bool:
    try:
        with open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
            return digest.hexdigest().startswith(sha256_prefix)
    except FileNotFoundError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process in at a time. The lock of a killed process is released; the lock file stays."""
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        write_message(f"waiting for another process that downloads {path}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(url: str, sha256_prefix: str, path: Path, max_bytes: int) -> None:
    partial_path = path.with_name(f"{path.name}.partial")
    if os.path.lexists(partial_path):
        open_regular(partial_path).close()  # never waits, as opening a FIFO does
    with _Partial(partial_path, max_bytes) as partial:
        _complete(url, sha256_prefix, partial)
    partial_path.replace(path)


class _Partial:
    """The growing file, its size, checksum and progress bar.

    Raises _FailedError if it grows too large or too slowly.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._since, self._received = time.monotonic(), 0  # of the minimum rate
        self._file = path.open("a+b", buffering=0)  # a killed process loses nothing
        self._file.seek(0)
        self._sha256 = hashlib.file_digest(self._file, "sha256")
        self.size = self._file.tell()
        hidden = not on_terminal()
        self._bar = tqdm(desc=path.stem, initial=self.size, unit="B", unit_scale=True, leave=False, disable=hidden)

    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def describe(self) -> str:
        return f"{self.size} bytes with SHA-256 {self.sha256()[:16]}..."

    def expect(self, size: int | None) -> None:
        """Sets the progress bar's total, the bytes of the whole file, or None if the server did not report it."""
        self._check_size(size or 0)
        self._bar.total, self._bar.n = size, self.size
        self._bar.refresh()

    def check_rate(self) -> None:
        seconds = time.monotonic() - self._since
        if seconds > RATE_SECONDS:
            if self._received < RATE_BYTES:
                raise _FailedError(f"only {self._received:,} bytes in {seconds:.0f} s (the next try resumes)")
            self._since, self._received = time.monotonic(), 0

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            self.clear()
            raise _FailedError(f"the server sends more than {self._max_bytes / 1e6:,.0f} MB, which is not this file")

    def write(self, data: bytes) -> None:
        self._check_size(self.size + len(data))
        self._received += len(data)
        self.check_rate()
        while data:  # a nearly full disk accepts only a part
            written = data[: self._file.write(data)]
            self._sha256.update(written)
            self.size += len(written)
            self._bar.update(len(written))
            data = data[len(written) :]

    def clear(self) -> None:
        self._file.truncate(0)
        self._sha256 = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> "_Partial":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        with self._file:
            if not kind:
                os.fsync(self._file.fileno())
        if kind and not self.size:
            self._path.unlink()


def _complete(url: str, sha256_prefix: str, partial: _Partial) -> None:
    """Requests the missing bytes until the checksum is right; lengths reported by the server are not trusted."""
    inherited = partial.size > 0  # from an earlier process: it may be damaged, or belong to another file
    largest = partial.size
    tries = 0
    ended = False  # whether the last response was complete
    while not partial.sha256().startswith(sha256_prefix):
        partial.check_rate()
        try:
            with _ask(url, partial.size) as response:
                from_start = response.status != HTTPStatus.PARTIAL_CONTENT
                if from_start and partial.size:
                    if ended and not inherited:  # the server has no more bytes, and those it had are wrong
                        found = partial.describe()
                        partial.clear()
                        raise _FailedError(f"got {found}, expected {sha256_prefix}...")
                    partial.clear()
                    if inherited:
                        inherited, largest = False, 0
                ended = False
                partial.expect(None if response.length is None else partial.size + response.length)
                for data in _read(response):
                    partial.write(data)
                ended = not response.length  # bytes still missing; None if the server reported no length
            problem = f"the response ended after {partial.describe()}"
        except _InterruptedError as error:
            problem = str(error)
        if partial.size > largest:
            largest, tries = partial.size, 0
            continue
        tries += 1
        if tries == TRIES:
            raise _FailedError(problem)
        time.sleep(PAUSE_SECONDS * tries)


def _ask(url: str, start: int) -> HTTPResponse:
    """Returns a response with the file from byte `start` on (status 206), or with the whole file (200)."""
    headers = {"User-Agent": "jaxft"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = _open(Request(url, headers=headers))
    except HTTPError as error:
        error.close()
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            return _ask(url, 0)
        problem = f"HTTP status {error.code}{_phrase(error.code)}"
        if error.code < 500 and error.code not in _TRANSIENT:
            raise _FailedError(problem) from None
        raise _InterruptedError(problem) from None
    except (OSError, HTTPException) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise _FailedError(f"its certificate is not trusted ({cause.verify_message})") from None
        raise _InterruptedError(printable(str(cause) or repr(cause))[:100]) from error
    problem = ""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        problem = "the server compresses the file, although it was not asked to"
    elif response.status == HTTPStatus.PARTIAL_CONTENT:
        part = response.headers.get("Content-Range", "")
        if not part.startswith(f"bytes {start}-"):
            problem = f"the server sent another part of the file than the one from byte {start}"
    elif response.status != HTTPStatus.OK:
        problem = f"HTTP status {response.status}{_phrase(response.status)}"
    if problem:
        response.close()
        if start:
            return _ask(url, 0)
        raise _FailedError(problem)
    return response


def _phrase(status: int) -> str:
    """Returns a status's meaning; the server's own text could move the terminal's cursor."""
    return f" {HTTPStatus(status).phrase}" if status in list(HTTPStatus) else ""


class _Redirects(HTTPRedirectHandler):
    """Follows redirects to http and https, but never from https to http."""

    max_redirections = MAX_REDIRECTS
    max_repeats = 2

    def http_error_302(self, req: Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        location = headers.get("location")
        if not location:
            return None  # becomes an HTTPError
        target = urljoin(req.full_url, location)
        before, after = urlsplit(req.full_url).scheme, urlsplit(target).scheme
        problem = ""
        if after not in ("http", "https") or (before, after) == ("https", "http"):
            problem = f"the server redirects from {before} to {printable(after[:100])}:, which is not followed"
        elif target in (visited := [req.full_url, *getattr(req, "redirect_dict", {})]) or len(visited) > MAX_REDIRECTS:
            problem = "the server redirects in a loop"
        if problem:
            fp.close()
            raise _FailedError(problem)
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _TimeLimit:
    """Closes the connections of a request after a number of seconds in all.

    A socket's own timeout does not limit the whole request, because it restarts with each byte.
    """

    def __init__(self, seconds: float) -> None:
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self.ended = False

    def add(self, connection: socket.socket) -> None:
        self._sockets.append(connection)
        if self.ended:
            self._end()

    def _end(self) -> None:
        self.ended = True
        for connection in self._sockets:
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def __enter__(self) -> "_TimeLimit":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _open(request: Request) -> HTTPResponse:
    """Sends a request over HTTP or HTTPS, through the environment's proxies.

    Raises _FailedError, or HTTPError, OSError and HTTPException as urlopen does.
    """
    with _TimeLimit(ANSWER_SECONDS) as limit:

        class Limited(HTTPConnection):
            def connect(self) -> None:
                super().connect()
                limit.add(self.sock)

        class LimitedTLS(HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                limit.add(self.sock)

        class HTTP(HTTPHandler):
            def http_open(self, request: Request) -> Any:
                return self.do_open(Limited, request)

        class HTTPS(HTTPSHandler):
            def https_open(self, request: Request) -> Any:
                return self.do_open(LimitedTLS, request)

        opener = OpenerDirector()
        for handler in (
            ProxyHandler(),
            UnknownHandler(),
            HTTP(),
            HTTPS(),
            HTTPDefaultErrorHandler(),
            HTTPErrorProcessor(),
            _Redirects(),
        ):
            opener.add_handler(handler)
        failure: Exception | None = None
        try:
            response = opener.open(request, timeout=TIMEOUT_SECONDS)
        except (OSError, HTTPException) as error:
            failure = error
    if limit.ended:  # headers that were cut off may look complete
        if not failure:
            response.close()
        raise TimeoutError(f"no answer within {ANSWER_SECONDS:.0f} s")
    if failure:
        raise failure
    return response


def _read(response: HTTPResponse) -> Iterator[bytes]:
    try:
        while data := response.read1(_CHUNK):
            interrupts.check()
            yield data
    except (OSError, HTTPException) as error:
        raise _InterruptedError(f"the connection broke: {error!r}") from error
