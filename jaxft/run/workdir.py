"""The workdir of a run: the names of its files, its lock and its config."""

import json
import os
import re
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from jaxft.config import auto_keys, default_config, flatten, keys_from_weights, may_change, resolve
from jaxft.errors import UserError, shortened, write_message
from jaxft.files import atomic_write, expand_user, read_json, reason
from jaxft.main_process import is_main_process
from jaxft.models.partition import parse_unfreeze

CONFIG = "config.json"
METRICS = "metrics.jsonl"
ACCURACY = "accuracy.json"
CHECKPOINTS = "checkpoints"  # CHECKPOINTS/STEP/
COMMIT = "_CHECKPOINT_METADATA"  # Orbax's last file of a checkpoint; without it the checkpoint is incomplete
DAMAGED_CHECKPOINTS = "damaged_checkpoints"
WANDB = "wandb"  # wandb creates it in the folder that it is given
LAST_STEP = 2**31 - 1  # a state's step is int32


def checkpoint_step(name: str) -> int | None:
    """Returns the step of a checkpoint's folder; None for any other name, such as '007', '-5' or '60 (copy)'."""
    step = int(name) if re.fullmatch("0|[1-9][0-9]{0,9}", name) else LAST_STEP + 1
    return step if step <= LAST_STEP else None


def local_folder(workdir: str | Path) -> Path:
    """Returns a workdir on this machine, with ~ expanded. Raises UserError for a path that no workdir can have."""
    if not str(workdir):
        raise UserError("--workdir is empty; name a folder, such as runs/NAME")
    try:
        path = expand_user(Path(workdir))
        str(path.absolute()).encode()
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        is_folder = True  # it will be
    except UnicodeEncodeError:
        name = shlex.quote(str(workdir).encode(errors="backslashreplace").decode())
        raise UserError(f"--workdir {name} has a name that is not UTF-8, which Orbax cannot open; rename it") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL
        text = f"--workdir {shlex.quote(str(workdir))} cannot be used ({reason(error)}); name another"
        raise UserError(text) from None
    if not is_folder:
        raise UserError(f"--workdir {shlex.quote(str(workdir))} is not a folder; name another")
    _check_not_below_checkpoints(path)
    return path


def _check_not_below_checkpoints(path: Path) -> None:
    """Raises UserError for a path in a run's CHECKPOINTS: a run there would be deleted with a checkpoint."""
    for folder in (path.absolute(), *path.absolute().parents):
        run = Workdir(folder.parent)
        if folder.name == CHECKPOINTS and run.config.is_file() and run.metrics.is_file():
            name = shlex.quote(str(run.path))
            text = f"--workdir {shlex.quote(str(path))} is inside the checkpoints of a run; name the run itself, {name}"
            raise UserError(f"{text} (with --checkpoint STEP, if the command has it), or another folder")


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
    def accuracy(self) -> Path:
        """The accuracies of metrics.jsonl that select the best checkpoint, with a checksum."""
        return self.path / ACCURACY

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
    def to_check(self) -> Path:
        """The list of mistakes and of test images that are also trained on."""
        return self.path / "images_to_check.csv"

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
            if os.path.lexists(path):
                text = f"{path} cannot be locked: {reason(error)}; remove it, or name another --workdir"
                raise UserError(text) from None
            raise self._not_writable(error) from None
        try:
            yield
        finally:
            lock.release()
            with suppress(OSError):  # removed meanwhile
                if not {*self.path.iterdir()} - {path}:
                    path.unlink(missing_ok=True)
                    self.path.rmdir()

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints on disk, including damaged ones, in ascending order.

        Raises UserError if the folder cannot be read.
        """
        try:
            names = [path.name for path in self.checkpoints.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.checkpoints} cannot be read: {reason(error)}; name another --workdir") from None
        return sorted(step for name in names if (step := checkpoint_step(name)) is not None)

    def has_checkpoint(self) -> bool:
        return bool(self.steps())

    def read_config(self) -> ConfigDict | None:
        """Returns the config that the run began with, or None if it has not begun.

        Raises UserError if the file is damaged, or missing although there are checkpoints.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--workdir {shlex.quote(str(self.path))} is not a folder; name another")
        try:
            return resolve(read_json(self.config))
        except FileNotFoundError:
            if self.has_checkpoint():
                raise UserError(f"{self.path} has checkpoints but no {CONFIG}; name another --workdir") from None
            return None
        except (OSError, ValueError, TypeError, RecursionError, UserError) as error:
            text = f"{self.config} cannot be read ({reason(error)}); put it back, or name another --workdir"
            raise UserError(text) from None

    def other_run(self, saved: ConfigDict) -> str | None:
        """Returns how a config saved in another file differs from DIR/config.json: then that file is of another run.

        None if it does not differ, or if there is no DIR/config.json that can be read.
        """
        try:
            stored = self.read_config()
        except UserError:
            return None
        if stored is None:
            return None
        differences = config_differences(stored, saved)
        if not differences:
            return None
        if [key for key, _, _ in differences] == ["num_epochs"] and not _obstacle_to_more_epochs(saved, stored):
            return None  # it has been raised since then
        key, there, here = differences[0]
        return f"{key} is {here!r} there and {there!r} in {self.config.name}"

    def write_config(self, config: ConfigDict) -> None:
        """Writes DIR/config.json from process 0. Raises UserError if it cannot be written."""
        if not is_main_process():
            return
        self._write_json(config.to_dict())

    def raise_num_epochs(self, num_epochs: int) -> None:
        """Replaces num_epochs in DIR/config.json, from process 0; see `resolve_config`."""
        if is_main_process():
            self._write_json(read_json(self.config) | {"num_epochs": num_epochs})

    def rename_data(self, name: str) -> None:
        """Replaces data.name in DIR/config.json, from process 0, after the folder of the images has moved."""
        if is_main_process():
            config = read_json(self.config)
            self._write_json(config | {"data": config["data"] | {"name": name}})

    def _write_json(self, config: dict[str, Any]) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.config, "w", fsync=True) as file:
                file.write(json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise self._not_writable(error) from None

    def without_newer_keys(self, config: ConfigDict) -> ConfigDict:
        """Returns the config with the defaults of keys that did not exist when the run began, and reports them.

        So a run resumes as it began, even if the recipe that it was started with has gained keys since then.
        """
        try:
            stored = flatten(ConfigDict(read_json(self.config)))
        except (OSError, ValueError, TypeError):  # not begun, or damaged, which `read_config` reports
            return config
        default = flatten(default_config())
        newer = {
            key: default[key]
            for key, value in flatten(config).items()
            if key not in stored and value != default[key] and not may_change(key, default[key], value)
        }
        if newer:
            if is_main_process():
                names = shortened(list(newer))
                write_message(f"{self.path} began with an older jaxft without {names}; it resumes as it began")
            config = ConfigDict(config.to_dict())
            config.update_from_flattened_dict(newer)
        return config

    def resolve_config(self, config: ConfigDict) -> ConfigDict:
        """Returns a copy of `config` with the values that were derived when the run began; unchanged for a new run.

        They are those of config.AUTO and config.FROM_WEIGHTS. Raises UserError if the workdir belongs to a run with
        another config; keys that `may_change` may differ, and num_epochs may be higher if the run then ends as if it
        had begun with it.
        """
        config = ConfigDict(config.to_dict())
        stored = self.read_config()
        if stored is None:
            return config
        derived = flatten(stored)
        keys = (*auto_keys(config), *keys_from_weights(config))
        config.update_from_flattened_dict({key: derived[key] for key in keys})
        differences = config_differences(stored, config)
        if [key for key, _, _ in differences] == ["num_epochs"]:
            if not (obstacle := _obstacle_to_more_epochs(stored, config)):
                return config
            name = shlex.quote(str(self.path))
            raise UserError(
                f"num_epochs is {stored.num_epochs} there and {config.num_epochs} here, but {obstacle}; start a run in "
                f"another --workdir from these weights: --config.model.pretrained={name}"
            )
        if differences:
            more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
            shown = "; ".join(f"{key} is {there!r} there and {here!r} here" for key, there, here in differences[:3])
            raise UserError(f"{self.path} belongs to another config ({shown}{more}); name another --workdir")
        return config

    def _not_writable(self, error: OSError) -> UserError:
        return UserError(f"--workdir {shlex.quote(str(self.path))} cannot be written: {reason(error)}; name another")


def config_differences(stored: ConfigDict, other: ConfigDict) -> list[tuple[str, Any, Any]]:
    """Returns (key, stored value, other value) of the keys that differ, except for those that `may_change`."""
    there, here = flatten(stored), flatten(other)
    return [
        (key, there.get(key), here.get(key))
        for key in sorted(here.keys() | there.keys())
        if there.get(key) != here.get(key) and not may_change(key, there.get(key), here.get(key))
    ]


def _obstacle_to_more_epochs(stored: ConfigDict, config: ConfigDict) -> str | None:
    """Returns why a run that continues to a higher num_epochs would differ from one that began with it, or None."""
    if config.num_epochs < stored.num_epochs:
        return "it can only be raised"
    if config.optimizer.schedule not in ("constant", "step"):
        return f"the {config.optimizer.schedule} schedule depends on it"
    if config.augment.first_image_size:
        return "augment.first_image_size depends on it"
    if config.model.batch_norm == "recalibrate":
        return "batch_norm=recalibrate depends on it"
    if any(stored.num_epochs < epoch <= config.num_epochs for epoch, _ in parse_unfreeze(config.optimizer.unfreeze)):
        return "optimizer.unfreeze has an epoch in between"
    return None
