"""The folders where jaxft keeps files, reading of regular files, checksums of JSON, and atomic writes."""

import errno
import glob
import json
import os
import shutil
import stat
import time
import zlib
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from jaxft import interrupts
from jaxft.errors import UserError

SAMPLES_DIR = Path(__file__).parent / "samples"
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
STALE_SECONDS = 24 * 3600  # a partial file this old belongs to a process that was killed


def cache_dir() -> Path:
    """Returns the folder of everything that jaxft can create again: $JAXFT_CACHE or ~/.cache/jaxft.

    Raises UserError if it is something else than a folder.
    """
    folder = expand_user(Path(os.environ.get("JAXFT_CACHE") or "~/.cache/jaxft"))
    if os.path.exists(folder) and not os.path.isdir(folder):  # noqa: PTH110, PTH112, pathlib's raise PermissionError
        raise UserError(f"the cache {folder} is not a folder; name one with the environment variable JAXFT_CACHE")
    return folder


def expand_user(path: Path) -> Path:
    """Replaces a leading ~ or ~NAME by the home folder; leaves it if there is no such folder or user."""
    with suppress(RuntimeError):
        return path.expanduser()
    return path


def output_argument(text: str) -> Path:
    """Parses the path of a file to write, with ~ expanded. Raises ArgumentTypeError if it certainly cannot be written.

    Checked early, since the work comes before the writing.
    """
    path = expand_user(Path(text))
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # it is too long, below a file, or below a folder that may not be read
        raise ArgumentTypeError(f"{path} cannot be written: {reason(error)}; name another file") from None
    if path.is_dir():
        raise ArgumentTypeError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ArgumentTypeError(f"there is no folder {path.parent}; create it, or name another file")
    if not os.access(path.parent, os.W_OK):
        raise ArgumentTypeError(f"{path.parent} may not be written; name a file in another folder")
    return path


def open_regular(path: Path) -> IO[bytes]:
    """Opens a regular file for reading; never waits, as opening a FIFO does.

    Raises OSError, which also covers folders, FIFOs, sockets, devices, links in a loop and paths that no file can have.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # NUL, or a character that the file system's encoding lacks
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is a {_KINDS.get(kind, 'device')}, not a file", str(path))
    return os.fdopen(descriptor, "rb")


def is_folder(path: Path) -> bool:
    """Returns whether a path leads to a folder; False also for a path that no file can have or that may not be read."""
    try:
        return path.is_dir()
    except OSError:
        return False


def read_regular(path: Path) -> bytes:
    """Returns the content of a regular file. Raises OSError as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises OSError as `open_regular` does, or ValueError for other content."""
    try:
        content = json.loads(read_regular(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Returns `content` after a round trip through JSON, with a CRC-32 of everything else as "crc32"."""
    text = json.dumps({key: value for key, value in content.items() if key != "crc32"}, sort_keys=True)
    return json.loads(text) | {"crc32": zlib.crc32(text.encode())}


def matches_checksum(content: dict[str, Any]) -> bool:
    """Returns whether the content of a JSON file has the checksum that `with_checksum` gave it."""
    return content == with_checksum(content)


def reason(error: Exception) -> str:
    """Returns what went wrong; of an OSError without its number and path: 'Permission denied'."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@contextmanager
def atomic_write(path: Path, mode: Literal["w", "wb"] = "wb", *, fsync: bool = False) -> Iterator[IO[Any]]:
    """Opens a partial file beside `path` and renames it to `path` at the end; on any error it is removed.

    The file's `name` is the partial's path, for libraries that open files themselves. fsync: the content is on disk
    before the rename, so that a power cut cannot lose it. kill -9 leaves the old file whole and a hidden partial, which
    the next write of the same file removes once it is a day old. Raises OSError that names `path`, never the partial.
    """
    partial = partial_path(path)
    try:
        _remove_stale_partials(path)
        interrupts.partials.add(str(partial))
        with partial.open(mode, encoding=None if mode == "wb" else "utf-8") as file:
            yield file
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except ValueError as error:
        if "\0" not in str(path):
            raise
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    finally:
        interrupts.partials.discard(str(partial))
        with suppress(OSError, ValueError):
            partial.unlink()


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a new folder that replaces `path` at the end; otherwise like `atomic_write`.

    If another process creates `path` at the same time, its folder stays.
    """
    _remove_stale_partials(path)
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process with the same id, as in a container
    partial.mkdir(parents=True)
    interrupts.partials.add(str(partial))
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        try:
            partial.rename(path)
        except OSError:
            if not path.exists():
                raise
    finally:
        interrupts.partials.discard(str(partial))
        shutil.rmtree(partial, ignore_errors=True)


def partial_path(path: Path) -> Path:
    """Returns the hidden path beside `path` under which this process writes it."""
    name = os.fsencode(path.name)[: 255 - len(f"..partial-{os.getpid()}")]  # file systems limit names to 255 bytes
    return path.with_name(f".{os.fsdecode(name)}.partial-{os.getpid()}")


def _remove_stale_partials(path: Path) -> None:
    name = partial_path(path).name.removesuffix(f"{os.getpid()}")
    for partial in path.parent.glob(f"{glob.escape(name)}*"):
        with suppress(OSError):  # another process may be doing the same
            if time.time() - partial.lstat().st_mtime > STALE_SECONDS:
                if partial.is_dir():
                    shutil.rmtree(partial)
                else:
                    partial.unlink()
