"""The workdir of a run: its lock, its config and the check that both belong together."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from jaxft.config import MAY_CHANGE, flatten, resolve
from jaxft.errors import UserError


@contextmanager
def workdir_lock(workdir: Path) -> Iterator[None]:
    """Keeps the workdir for this run alone; where nothing was written, it is gone afterwards."""
    if jax.process_index():
        yield
        return
    path = workdir / ".lock"
    lock = FileLock(path)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another run is training in {workdir}; wait for it, or name another --workdir") from None
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error}") from None
    try:
        yield
    finally:
        lock.release()
        if not {*workdir.iterdir()} - {path}:
            path.unlink(missing_ok=True)
            workdir.rmdir()


def has_checkpoint(workdir: Path) -> bool:
    return any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*"))


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Raises UserError where the workdir belongs to another config; keys of MAY_CHANGE aside.

    A batch_size that is to be found is what was found when the run began.
    """
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is no folder; name another")
    if not path.exists():
        if has_checkpoint(workdir):
            raise UserError(f"{workdir} has checkpoints but no config.json; name another --workdir")
        return
    try:
        there = flatten(resolve(json.loads(path.read_text())))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); name another --workdir") from None
    config.batch_size = config.batch_size or there["batch_size"]
    here = flatten(config)
    differ = [
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for key in here | there
        if key not in MAY_CHANGE and there.get(key) != here.get(key)
    ]
    if differ:
        raise UserError(f"{workdir} belongs to another config ({'; '.join(differ)}); name another --workdir")


def write_config(config: ConfigDict, workdir: Path) -> None:
    """DIR/config.json, by process 0."""
    if jax.process_index():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        partial = workdir / "config.json.partial"
        partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        partial.replace(workdir / "config.json")
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error}") from None
