"""Remote workdirs such as gs://BUCKET/RUN: the run works in a local mirror that is synchronised with the URL.

Any URL that fsspec opens will do. A checkpoint's commit marker, COMMIT, is uploaded last and deleted first, so a
checkpoint without one does not exist. The marker holds the times of the save: equal markers mean equal checkpoints.
"""

import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import jax
from filelock import FileLock
from orbax.checkpoint.multihost import sync_global_processes

from jaxft.errors import UserError, one_line, write_message
from jaxft.files import atomic_write, cache_dir, open_regular, read_regular
from jaxft.main_process import is_main_process
from jaxft.run.workdir import (
    CHECKPOINTS,
    COMMIT,
    CONFIG,
    DAMAGED_CHECKPOINTS,
    METRICS,
    WANDB,
    checkpoint_step,
    local_folder,
)

PUSH_SECONDS = 5
PULL_ATTEMPTS = 5  # to read a run whose machine replaces its checkpoints meanwhile
PULL_SECONDS = 3600  # how long the others wait for process 0 to download
UP_TO_DATE = "the workdir is up to date"  # name of the barrier
NOT_MIRRORED = {DAMAGED_CHECKPOINTS, WANDB}
URL = ".url"  # file in a mirror that holds its URL
PROBE = ".probe"  # file that tests whether the URL can be written
PUSHED = ".brought"  # file in a mirror that marks that it has been uploaded, at least in part


def is_remote(workdir: str | Path) -> bool:
    """Returns whether the workdir is a URL. Raises UserError for gs:/BUCKET, which would become a local folder."""
    if one_slash := re.match(r"(gs|s3|az|hf):/(?!/)", str(workdir)):
        raise UserError(f"--workdir {workdir} lacks a slash; write {one_slash[1]}://BUCKET/RUN")
    return "://" in str(workdir)


def is_mirror(folder: Path) -> bool:
    """Returns whether a folder on this machine is the mirror of a URL."""
    return (folder / URL).is_file()


def display_name(folder: Path) -> str:
    """Returns the workdir as the user named it: a mirror's URL, or the folder."""
    try:
        return read_regular(folder / URL).decode()
    except (OSError, ValueError):
        return str(folder)


def training_folder(workdir: str | Path) -> Path:
    """Returns the folder in which this process trains: `workdir` itself or its mirror. Raises UserError."""
    if not is_remote(workdir):
        return local_folder(workdir)
    return _mirror_folder(workdir, f"process-{jax.process_index()}")


@contextmanager
def synced(workdir: str | Path, folder: Path) -> Iterator[None]:
    """Synchronises the mirror `folder` with the URL `workdir`: at the start, every PUSH_SECONDS and at the end.

    If an earlier run left results in the mirror that it could not upload, they are uploaded first. Raises UserError if
    the URL cannot be read, or cannot be written at the start or the end; failures in between are reported on stderr
    and retried. Does nothing for a local workdir.
    """
    if not is_remote(workdir):
        yield
        return
    if not is_main_process():
        sync_global_processes(UP_TO_DATE, timeout=PULL_SECONDS)
        _Mirror(str(workdir), folder).pull()
        yield
        return
    mirror = _Mirror(str(workdir), folder)
    mirror.check_writable()
    if mirror.local_is_ahead():
        _call(mirror.push, f"--workdir {workdir} cannot be written")
    else:
        mirror.pull()
    sync_global_processes(UP_TO_DATE, timeout=PULL_SECONDS)
    done = threading.Event()
    pushing = threading.Thread(target=_keep_pushing, args=(mirror, done), daemon=True)
    pushing.start()
    try:
        yield
    finally:
        done.set()
        pushing.join()
        try:
            mirror.push()
        except Exception as error:
            remedy = f"the whole run is in {folder}; the same command on this machine uploads it"
            raise UserError(f"{workdir} cannot be written ({_short(error)}); {remedy}") from error


def _keep_pushing(mirror: "_Mirror", done: threading.Event) -> None:
    """Pushes every PUSH_SECONDS until `done`; reports the first of several failures in a row."""
    failed = False
    while not done.wait(PUSH_SECONDS):
        try:
            mirror.push()
            failed = False
        except Exception as error:  # every file system has its own
            if not failed:
                write_message(f"\n{mirror.url} cannot be written ({_short(error)}); trying again")
            failed = True


def reading_folder(workdir: str | Path) -> Path:
    """Returns `workdir` itself, or a mirror of it that is up to date. Raises UserError."""
    if not is_remote(workdir):
        return local_folder(workdir)
    folder = _mirror_folder(workdir, f"reading-{jax.process_index()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        for attempt in range(PULL_ATTEMPTS):
            try:
                _Mirror(str(workdir), folder).pull()
                break
            except UserError as error:
                if attempt == PULL_ATTEMPTS - 1 or not isinstance(error.__cause__, FileNotFoundError):
                    raise
    return folder


def upload(workdir: str | Path, file: Path) -> None:
    """Uploads a file that was written into reading_folder(workdir); does nothing for a local workdir."""
    if is_remote(workdir):
        fs, root = _open(str(workdir))
        _call(lambda: fs.pipe_file(f"{root}/{file.name}", file.read_bytes()), f"--workdir {workdir} cannot be written")


def _mirror_folder(workdir: str | Path, name: str) -> Path:
    url = str(workdir).rstrip("/")
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", url.partition("://")[2])[-50:]
    return cache_dir() / "workdirs" / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:16]}" / name


def _open(url: str) -> tuple[Any, str]:
    """Returns the file system and the path in it, without a trailing slash. Raises UserError."""
    from fsspec.core import url_to_fs  # imports the file system's client

    try:
        fs, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        client = "; gs:// needs pip install 'jaxft[gcs]'" if url.startswith("gs://") else ""
        raise UserError(f"--workdir {url} cannot be opened: {_short(error)}{client}") from None
    if not str(root).strip("/"):
        raise UserError(f"--workdir {url} names no folder; write {url.partition('://')[0]}://BUCKET/RUN")
    return fs, str(root).rstrip("/")


def _short(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", 120)


def _call(function: Callable[[], Any], problem: str) -> Any:
    """Calls a function of the remote file system. Raises UserError, which begins with `problem`, for any exception."""
    try:
        return function()
    except Exception as error:  # every file system has its own
        raise UserError(f"{problem}: {_short(error)}") from error


def _step(name: str) -> str | None:
    """Returns the checkpoint that a file belongs to: '7' for 'checkpoints/7/state/x', None for other files."""
    parts = PurePosixPath(name).parts
    is_checkpoint = len(parts) > 2 and parts[0] == CHECKPOINTS and checkpoint_step(parts[1]) is not None
    return parts[1] if is_checkpoint else None


class _Mirror:
    """A local folder and the URL that it is synchronised with."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self._folder = folder
        self._checkpoints = folder / CHECKPOINTS
        self._fs, self._root = _open(url)
        self._names: set[str] = set()  # remote files
        self._committed: dict[str, bytes] = {}  # {step: content of COMMIT} of the remote checkpoints
        self._pushed: dict[str, tuple[int, int]] = {}  # size and mtime of a local file when it was last uploaded
        _call(self._list, f"--workdir {url} cannot be read")

    def _list(self) -> None:
        self._fs.invalidate_cache()
        found = self._fs.find(self._root, detail=True) if self._fs.exists(self._root) else {}
        if others := [path for path, details in found.items() if details["type"] != "file"]:
            name = str(others[0]).removeprefix(self._root).lstrip("/")
            raise OSError(f"{name} is not a file")  # a FIFO, for example, which would never end
        self._names = {str(path).removeprefix(self._root).lstrip("/") for path in found}
        for name in self._names:
            if (step := _step(name)) and name == f"{CHECKPOINTS}/{step}/{COMMIT}":
                self._committed[step] = self._fs.cat_file(f"{self._root}/{name}")

    def local_is_ahead(self) -> bool:
        """Returns whether the mirror holds the URL's run, up to the same step or a later one. Raises UserError."""
        if not self._names:  # never uploaded, or removed by the user
            return (self._folder / CONFIG).exists() and not (self._folder / PUSHED).exists()

        def extends(name: str) -> bool:
            local = self._folder / name
            remote = self._fs.cat_file(f"{self._root}/{name}") if name in self._names else None
            return remote is not None and local.exists() and read_regular(local).startswith(remote)

        return bool(_call(lambda: extends(CONFIG) and extends(METRICS), f"--workdir {self.url} cannot be read"))

    def check_writable(self) -> None:
        """Raises UserError if the URL cannot be written: now rather than after hours of training."""

        def probe() -> None:
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(f"{self._root}/{PROBE}", b"")
            self._fs.rm_file(f"{self._root}/{PROBE}")

        _call(probe, f"--workdir {self.url} cannot be written")

    def pull(self) -> None:
        """Makes the mirror equal to the URL. Raises UserError if the URL cannot be read."""
        _call(self._pull, f"--workdir {self.url} cannot be read")

    def _pull(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / URL).write_text(self.url)
        wanted = {name for name in self._names if (step := _step(name)) is None or step in self._committed}
        for path in self._files():
            if path.relative_to(self._folder).as_posix() not in wanted:
                path.unlink()
        for path in self._checkpoints.glob("*"):
            committed = self._local_commit(path.name)
            if committed is None or committed != self._committed.get(path.name):  # including a partly pulled one
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in sorted(wanted, key=lambda name: (PurePosixPath(name).name == COMMIT, name)):
            target = self._folder / name
            if _step(name) and target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target) as file:
                self._fs.get_file(f"{self._root}/{name}", file.name)

    def push(self) -> None:
        """Uploads what has changed: first metrics and other files, then the checkpoints that they describe."""
        for path in self._files():
            name, stat = path.relative_to(self._folder).as_posix(), path.stat()
            if self._pushed.get(name) != (stat.st_size, stat.st_mtime_ns):
                self._make_parent(name)
                self._fs.pipe_file(f"{self._root}/{name}", read_regular(path))  # a snapshot, since the file may grow
                self._pushed[name] = (stat.st_size, stat.st_mtime_ns)
                (self._folder / PUSHED).touch()
        local = {
            path.name: committed
            for path in self._checkpoints.glob("*")
            if checkpoint_step(path.name) is not None and (committed := self._local_commit(path.name))
        }
        for step in sorted(local, key=int, reverse=True):  # the latest first, as it may replace the others meanwhile
            if self._committed.get(step) != local[step]:
                self._remove(step)
                self._push_checkpoint(step, local[step])
        for step in self._committed.keys() - local.keys():
            self._remove(step)

    def _push_checkpoint(self, step: str, committed: bytes) -> None:
        folder = self._checkpoints / step
        files = sorted(path for path in folder.rglob("*") if not path.is_dir() and path.name != COMMIT)
        try:
            for path in files:
                name = path.relative_to(self._folder).as_posix()
                self._make_parent(name)
                open_regular(path).close()  # else a FIFO would never end
                self._fs.put_file(str(path), f"{self._root}/{name}")
        except FileNotFoundError:
            if folder.exists():
                raise
        if all(path.exists() for path in files) and folder.exists():  # a newer checkpoint may have replaced it
            self._fs.pipe_file(f"{self._root}/{CHECKPOINTS}/{step}/{COMMIT}", committed)
            self._committed[step] = committed

    def _remove(self, step: str) -> None:
        folder = f"{self._root}/{CHECKPOINTS}/{step}"
        if self._committed.pop(step, None):
            self._fs.rm_file(f"{folder}/{COMMIT}")
        self._fs.invalidate_cache()
        if self._fs.exists(folder):
            self._fs.rm(folder, recursive=True)

    def _make_parent(self, name: str) -> None:
        self._fs.makedirs(f"{self._root}/{PurePosixPath(name).parent}", exist_ok=True)  # a no-op in a bucket

    def _local_commit(self, step: str) -> bytes | None:
        try:
            return read_regular(self._checkpoints / step / COMMIT)
        except OSError:
            return None

    def _files(self) -> list[Path]:
        """Returns the mirrored files without checkpoints, which are synchronised as whole folders."""
        found = []
        for path in sorted(self._folder.rglob("*")):
            parts = path.relative_to(self._folder).parts
            hidden = any(part.startswith(".") for part in parts)  # including the partial files of files.atomic_write
            if not hidden and parts[0] not in NOT_MIRRORED | {CHECKPOINTS} and path.is_file():
                found.append(path)
        return found
