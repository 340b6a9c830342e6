"""Downloads a file once: resumes interrupted downloads and verifies the checksum before the final rename.

The partial file NAME.partial outlives the process, unlike those of files.atomic_write, so that the next one resumes.
"""

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout
from tqdm import tqdm

from jaxft.errors import UserError

TIMEOUT_SECONDS = 10.0  # to connect, and between two chunks of the response
TRIES = 3  # in a row without any new bytes
PAUSE_SECONDS = 0.5  # before the second try, and twice that before the third
_TRANSIENT = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)  # and 500 to 599
_CHUNK = 1 << 18


class _InterruptedError(Exception):
    """A failure of the network or the server that may be temporary."""


class _FailedError(Exception):
    """A failure that another try would not fix."""


def fetch(url: str, sha256_prefix: str, folder: Path) -> Path:
    """Returns the file in `folder`, downloading it unless it is there with the right SHA-256.

    Processes that need the same file wait for the first one's download. Raises UserError.
    """
    path = folder / PurePosixPath(urlsplit(url).path).name
    try:
        if not _is_right(path, sha256_prefix):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                if not _is_right(path, sha256_prefix):  # by now another process may have fetched it
                    _fetch(url, sha256_prefix, path)
    except _FailedError as error:
        replacing = ", replacing the wrong one" if path.exists() else ""
        raise UserError(
            f"{url} could not be downloaded: {error}; download it by other means and put it into {folder}{replacing} "
            f"(its SHA-256 starts with {sha256_prefix})"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read or written: {error.strerror or error}") from error
    return path


def _is_right(path: Path, sha256_prefix: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest().startswith(sha256_prefix)
    except FileNotFoundError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process in at a time. The lock of a killed process is released; the lock file stays."""
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that downloads {path}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(url: str, sha256_prefix: str, path: Path) -> None:
    partial_path = path.with_name(f"{path.name}.partial")
    with _Partial(partial_path) as partial:
        _complete(url, sha256_prefix, partial)
    partial_path.replace(path)


class _Partial:
    """The growing file, its size, checksum and progress bar."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a+b", buffering=0)  # a killed process loses nothing
        self._file.seek(0)
        self._sha256 = hashlib.file_digest(self._file, "sha256")
        self.size = self._file.tell()
        hidden = not sys.stderr.isatty()
        self._bar = tqdm(desc=path.stem, initial=self.size, unit="B", unit_scale=True, leave=False, disable=hidden)

    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def describe(self) -> str:
        return f"{self.size} bytes with SHA-256 {self.sha256()[:16]}..."

    def expect(self, size: int | None) -> None:
        """Sets the progress bar's total, the bytes of the whole file."""
        self._bar.total, self._bar.n = size, self.size
        self._bar.refresh()

    def write(self, data: bytes) -> None:
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
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except HTTPError as error:
        error.close()
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            return _ask(url, 0)
        problem = f"HTTP status {error.code} {error.reason}"
        if error.code < 500 and error.code not in _TRANSIENT:
            raise _FailedError(problem) from None
        raise _InterruptedError(problem) from None
    except (OSError, HTTPException) as error:
        raise _InterruptedError(getattr(error, "reason", error)) from error
    part = response.headers.get("Content-Range", "")
    if start and response.status == HTTPStatus.PARTIAL_CONTENT and not part.startswith(f"bytes {start}-"):
        response.close()
        return _ask(url, 0)
    return response


def _read(response: HTTPResponse) -> Iterator[bytes]:
    try:
        while data := response.read1(_CHUNK):
            yield data
    except (OSError, HTTPException) as error:
        raise _InterruptedError(f"the connection broke: {error!r}") from error
