"""The folders where jaxft keeps files, and atomic writes."""

import glob
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

SAMPLES_DIR = Path(__file__).parent / "samples"
STALE_SECONDS = 24 * 3600  # a partial file this old belongs to a process that was killed


def cache_dir() -> Path:
    """Returns the folder of everything that jaxft can create again: $JAXFT_CACHE or ~/.cache/jaxft."""
    return Path(os.environ.get("JAXFT_CACHE") or Path.home() / ".cache" / "jaxft")


@contextmanager
def atomic_write(path: Path, mode: Literal["w", "wb"] = "wb", *, fsync: bool = False) -> Iterator[IO[Any]]:
    """Opens a partial file beside `path` and renames it to `path` at the end; on any error it is removed.

    The file's `name` is the partial's path, for libraries that open files themselves. fsync: the content is on disk
    before the rename, so that a power cut cannot lose it. kill -9 leaves the old file whole and a hidden partial, which
    the next write of the same file removes once it is a day old.
    """
    _remove_stale_partials(path)
    partial = partial_path(path)
    try:
        with partial.open(mode, encoding=None if mode == "wb" else "utf-8") as file:
            yield file
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a new folder that replaces `path` at the end; otherwise like `atomic_write`.

    If another process creates `path` at the same time, its folder stays.
    """
    _remove_stale_partials(path)
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process with the same id, as in a container
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        try:
            partial.rename(path)
        except OSError:
            if not path.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_path(path: Path) -> Path:
    """Returns the hidden path beside `path` under which this process writes it."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _remove_stale_partials(path: Path) -> None:
    for partial in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        with suppress(OSError):  # another process may be doing the same
            if time.time() - partial.lstat().st_mtime > STALE_SECONDS:
                if partial.is_dir():
                    shutil.rmtree(partial)
                else:
                    partial.unlink()
