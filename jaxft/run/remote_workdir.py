"""A workdir that is elsewhere, such as gs://BUCKET/RUN: used in a folder of this machine that is kept like it.

Any URL that fsspec opens will do. A checkpoint's COMMITTED goes there last and is removed first, so that one without it
is none; it holds the times of the save, so that two checkpoints with the same one are the same.
"""

import hashlib
import logging
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import jax
from filelock import FileLock
from orbax.checkpoint.multihost import sync_global_processes

from jaxft.errors import UserError
from jaxft.files import cache_dir

COMMITTED = "_CHECKPOINT_METADATA"


PUSH_SECONDS = 5


PULL_SECONDS = 3600  # that process 0 may need before the others begin


UP_TO_DATE = "the workdir is up to date"


LOCAL = {"damaged_checkpoints", "wandb"}


URL = ".url"  # in a folder of this machine, of what it is kept like


PROBE = ".probe"  # of whether there can be written


PUSHED = ".brought"  # in a folder of which some of the run went there


def is_remote(workdir: str | Path) -> bool:
    """Raises UserError for gs:/BUCKET, which Orbax would take for a bucket and the rest for a folder."""
    if one_slash := re.match(r"(gs|s3|az|hf):/(?!/)", str(workdir)):
        raise UserError(f"--workdir {workdir} lacks a slash; write {one_slash[1]}://BUCKET/RUN")
    return "://" in str(workdir)


def display_name(folder: Path) -> str:
    """The workdir that a person named."""
    url = folder / URL
    return url.read_text() if url.exists() else str(folder)


def training_folder(workdir: str | Path) -> Path:
    """Where this process trains: `workdir` itself, or the folder that is kept like it."""
    return _folder(workdir, f"process-{jax.process_index()}") if is_remote(workdir) else Path(workdir)


@contextmanager
def synced(workdir: str | Path, folder: Path) -> Iterator[None]:
    """Brings training_folder(workdir) up to date, and then what is `workdir` every PUSH_SECONDS and at the end.

    What an earlier run left in the folder and could not bring there is gone on from. Raises UserError where `workdir`
    cannot be read, or not be written at the beginning or the end; in between it is told and tried again.
    """
    if not is_remote(workdir):
        yield
        return
    if jax.process_index():
        sync_global_processes(UP_TO_DATE, timeout=PULL_SECONDS)
        _Copy(str(workdir), folder).pull()
        yield
        return
    copy = _Copy(str(workdir), folder)
    _told(workdir, "written", copy.try_to_write)
    if copy.local_is_ahead():
        _told(workdir, "written", copy.push)
    else:
        copy.pull()
    sync_global_processes(UP_TO_DATE, timeout=PULL_SECONDS)
    done = threading.Event()

    def keep_pushing() -> None:
        text = False
        while not done.wait(PUSH_SECONDS):
            try:
                copy.push()
                text = False
            except Exception as error:  # each file system has its own
                if not text:
                    print(f"\n{workdir} cannot be written ({_short(error)}); trying again", file=sys.stderr, flush=True)
                text = True

    pushing = threading.Thread(target=keep_pushing, daemon=True)
    pushing.start()
    try:
        yield
    finally:
        done.set()
        pushing.join()
        try:
            copy.push()
        except Exception as error:
            remedy = f"all of the run is in {folder}; the same command on this machine brings it there"
            raise UserError(f"{workdir} cannot be written ({_short(error)}); {remedy}") from error


def reading_folder(workdir: str | Path) -> Path:
    """`workdir` itself, or a folder that is brought up to date with it now. Raises UserError."""
    if not is_remote(workdir):
        return Path(workdir)
    folder = _folder(workdir, f"reading-{jax.process_index()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        _Copy(str(workdir), folder).pull()
    return folder


def upload(workdir: str | Path, file: Path) -> None:
    """A file that was written into reading_folder(workdir)."""
    if is_remote(workdir):
        fs, root = _open(str(workdir))
        _told(workdir, "written", lambda: fs.pipe_file(f"{root}/{file.name}", file.read_bytes()))


def _folder(workdir: str | Path, name: str) -> Path:
    url = str(workdir).rstrip("/")
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", url.partition("://")[2])[-50:]
    return cache_dir() / "workdirs" / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:16]}" / name


def _open(url: str) -> tuple[Any, str]:
    """The file system, and the path in it without a slash at its end."""
    from fsspec.core import url_to_fs  # brings the client of the file system with it

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # tracebacks of what is told here in one line
    try:
        fs, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        client = "; gs:// needs pip install 'jaxft[gcs]'" if url.startswith("gs://") else ""
        raise UserError(f"--workdir {url} cannot be opened: {_short(error)}{client}") from None
    if not str(root).strip("/"):
        raise UserError(f"--workdir {url} names no folder; write {url.partition('://')[0]}://BUCKET/RUN")
    return fs, str(root).rstrip("/")


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _told(workdir: str | Path, what: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # each file system has its own
        raise UserError(f"--workdir {workdir} cannot be {what}: {_short(error)}") from error


def _step(name: str) -> str | None:
    """Of the checkpoint that a file belongs to: 'checkpoints/7/state/x' is of '7'."""
    parts = PurePosixPath(name).parts
    return parts[1] if len(parts) > 2 and parts[0] == "checkpoints" and parts[1].isdecimal() else None


class _Copy:
    """A folder and the URL that it is kept like."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url, folder
        self._fs, self._root = _open(url)
        self._names: set[str] = set()  # of the files there
        self._committed: dict[str, bytes] = {}  # COMMITTED there, by step
        self._pushed: dict[str, tuple[int, int]] = {}  # size and time of a file here when it was last brought there
        _told(url, "read", self._look)

    def _look(self) -> None:
        self._fs.invalidate_cache()
        found = self._fs.find(self._root) if self._fs.exists(self._root) else []
        self._names = {str(path).removeprefix(self._root).lstrip("/") for path in found}
        for name in self._names:
            if (step := _step(name)) and name == f"checkpoints/{step}/{COMMITTED}":
                self._committed[step] = self._fs.cat_file(f"{self._root}/{name}")

    def local_is_ahead(self) -> bool:
        """Whether the folder holds the same run, as far as it is there or further."""
        if not self._names:  # never brought there, or removed there
            return (self._folder / "config.json").exists() and not (self._folder / PUSHED).exists()

        def begins_alike(name: str) -> bool:
            here = self._folder / name
            there = self._fs.cat_file(f"{self._root}/{name}") if name in self._names else None
            return there is not None and here.exists() and here.read_bytes().startswith(there)

        return bool(_told(self._url, "read", lambda: all(map(begins_alike, ("config.json", "metrics.jsonl")))))

    def try_to_write(self) -> None:
        """Before hours of training."""
        self._fs.makedirs(self._root, exist_ok=True)
        self._fs.pipe_file(f"{self._root}/{PROBE}", b"")
        self._fs.rm_file(f"{self._root}/{PROBE}")

    def pull(self) -> None:
        _told(self._url, "read", self._pull)

    def _pull(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / URL).write_text(self._url)
        wanted = {name for name in self._names if (step := _step(name)) is None or step in self._committed}
        for path in self._files():
            if path.relative_to(self._folder).as_posix() not in wanted:
                path.unlink()
        for path in (self._folder / "checkpoints").glob("*"):
            committed = self._committed_here(path.name)
            if committed is None or committed != self._committed.get(path.name):  # also half of an earlier pull
                shutil.rmtree(path)
        for name in sorted(wanted, key=lambda name: (PurePosixPath(name).name == COMMITTED, name)):
            target = self._folder / name
            if _step(name) and target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.partial")
            self._fs.get_file(f"{self._root}/{name}", str(partial))
            partial.replace(target)

    def push(self) -> None:
        """First what tells of a checkpoint, then the checkpoint."""
        for path in self._files():
            name, stat = path.relative_to(self._folder).as_posix(), path.stat()
            if self._pushed.get(name) != (stat.st_size, stat.st_mtime_ns):
                self._make_parent(name)
                self._fs.pipe_file(f"{self._root}/{name}", path.read_bytes())  # as it is now: it may grow meanwhile
                self._pushed[name] = (stat.st_size, stat.st_mtime_ns)
                (self._folder / PUSHED).touch()
        here = {
            path.name: committed
            for path in (self._folder / "checkpoints").glob("*")
            if path.name.isdecimal() and (committed := self._committed_here(path.name))
        }
        for step in sorted(here, key=int, reverse=True):  # the latest may replace the others
            if self._committed.get(step) != here[step]:
                self._remove(step)
                self._push_checkpoint(step, here[step])
        for step in self._committed.keys() - here.keys():
            self._remove(step)

    def _push_checkpoint(self, step: str, committed: bytes) -> None:
        folder = self._folder / "checkpoints" / step
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMMITTED)
        try:
            for path in files:
                name = path.relative_to(self._folder).as_posix()
                self._make_parent(name)
                self._fs.put_file(str(path), f"{self._root}/{name}")
        except FileNotFoundError:
            if folder.exists():
                raise
        if all(path.exists() for path in files) and folder.exists():  # a newer checkpoint may have replaced it
            self._fs.pipe_file(f"{self._root}/checkpoints/{step}/{COMMITTED}", committed)
            self._committed[step] = committed

    def _remove(self, step: str) -> None:
        folder = f"{self._root}/checkpoints/{step}"
        if self._committed.pop(step, None):
            self._fs.rm_file(f"{folder}/{COMMITTED}")
        self._fs.invalidate_cache()
        if self._fs.exists(folder):
            self._fs.rm(folder, recursive=True)

    def _make_parent(self, name: str) -> None:
        self._fs.makedirs(f"{self._root}/{PurePosixPath(name).parent}", exist_ok=True)  # nothing, in a bucket

    def _committed_here(self, step: str) -> bytes | None:
        path = self._folder / "checkpoints" / step / COMMITTED
        return path.read_bytes() if path.exists() else None

    def _files(self) -> list[Path]:
        """Of the folder, all that is kept like there; checkpoints, which come and go, are not among them."""
        found = []
        for path in sorted(self._folder.rglob("*")):
            parts = path.relative_to(self._folder).parts
            hidden = any(part.startswith(".") or part.endswith(".partial") for part in parts)
            if not hidden and parts[0] not in LOCAL | {"checkpoints"} and path.is_file():
                found.append(path)
        return found
