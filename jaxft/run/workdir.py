"""The workdir of a run: the names of its files, its lock and its config."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from jaxft.config import MAY_CHANGE, flatten, resolve
from jaxft.errors import UserError
from jaxft.files import atomic_write
from jaxft.main_process import is_main_process

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"  # CHECKPOINTS/STEP/
DAMAGED_CHECKPOINTS = "damaged_checkpoints"
WANDB = "wandb"  # wandb creates it in the folder that it is given


@dataclass(frozen=True)
class Workdir:
    """A run's folder on this machine."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def damaged_checkpoints(self) -> Path:
        return self.path / DAMAGED_CHECKPOINTS

    @property
    def evaluation(self) -> Path:
        """The latest epoch's predictions, for the report."""
        return self.path / "evaluation.npz"

    @property
    def sheet(self) -> Path:
        """Augmented training images, for the report."""
        return self.path / "sheet.jpg"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def comparison(self) -> Path:
        return self.path / "compare.html"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Reserves the workdir for this run, and removes it at the end if nothing was written into it.

        Raises UserError if another run holds the lock or the folder cannot be written.
        """
        if not is_main_process():
            yield
            return
        path = self.path / ".lock"
        lock = FileLock(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another run is training in {self.path}; wait for it, or name another --workdir") from None
        except OSError as error:
            raise self._not_writable(error) from None
        try:
            yield
        finally:
            lock.release()
            if not {*self.path.iterdir()} - {path}:
                path.unlink(missing_ok=True)
                self.path.rmdir()

    def has_checkpoint(self) -> bool:
        return any(path.name.isdecimal() for path in self.checkpoints.glob("*"))

    def read_config(self) -> ConfigDict | None:
        """Returns the config that the run began with, or None if it has not begun.

        Raises UserError if the file is damaged, or missing although there are checkpoints.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--workdir {self.path} is not a folder; name another")
        if not self.config.exists():
            if self.has_checkpoint():
                raise UserError(f"{self.path} has checkpoints but no {CONFIG}; name another --workdir")
            return None
        try:
            return resolve(json.loads(self.config.read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.config} cannot be read ({error}); name another --workdir") from None

    def write_config(self, config: ConfigDict) -> None:
        """Writes DIR/config.json from process 0. Raises UserError if it cannot be written."""
        if not is_main_process():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.config, "w", fsync=True) as file:
                file.write(json.dumps(config.to_dict(), indent=2) + "\n")
        except OSError as error:
            raise self._not_writable(error) from None

    def resolve_config(self, config: ConfigDict) -> ConfigDict:
        """Returns a copy of `config` in which batch_size 0 is replaced by the size found when the run began, if it has.

        Raises UserError if the workdir belongs to a run with another config; the keys of MAY_CHANGE may differ.
        """
        config = ConfigDict(config.to_dict())
        stored = self.read_config()
        if stored is None:
            return config
        config.batch_size = config.batch_size or stored.batch_size
        here, there = flatten(config), flatten(stored)
        differences = [
            f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
            for key in sorted(here.keys() | there.keys())
            if key not in MAY_CHANGE and there.get(key) != here.get(key)
        ]
        if differences:
            more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
            shown = "; ".join(differences[:3]) + more
            raise UserError(f"{self.path} belongs to another config ({shown}); name another --workdir")
        return config

    def _not_writable(self, error: OSError) -> UserError:
        return UserError(f"--workdir {self.path} cannot be written: {error}")
