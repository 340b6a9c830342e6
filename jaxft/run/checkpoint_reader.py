"""Reads checkpoints, and verifies every file and array of them before it is used."""

import errno
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import MultiprocessingOptions

from jaxft.config import resolve
from jaxft.data.batches import replicate
from jaxft.errors import UserError, one_line, write_message
from jaxft.files import matches_checksum, open_regular, read_json, reason
from jaxft.run.metrics_file import read_scores
from jaxft.run.workdir import COMMIT, Workdir, checkpoint_step, local_folder

FORMAT = 1  # of a checkpoint's info; 0.1 stored none
INFO, TREE = "info/metadata", "state/_METADATA"  # Orbax's JSON files, like COMMIT
NEWEST_GOOD = "--config.checkpoint.on_damage=newest_good"
COMMIT_KEYS = {
    "item_handlers": dict | str,
    "init_timestamp_nsecs": int,
    "commit_timestamp_nsecs": int,
    "metrics": dict,
    "performance_metrics": dict,
    "custom_metadata": dict,
}
# Errors of files that are missing, of another kind, or links in a loop: damage, unlike a missing permission.
_NOT_A_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENXIO, errno.ESTALE}


class State(Protocol):
    """A pytree of arrays that knows its step."""

    @property
    def step(self) -> Any: ...


StateT = TypeVar("StateT", bound=State)


class DamagedCheckpointError(UserError):
    """A checkpoint's files are missing or wrong, or it is not of the step or run that its path says."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


class CheckpointReader:
    """The checkpoints DIR/checkpoints/STEP/{state,info} of a run, for reading.

    Orbax restores the arrays of a state; each is then compared with its checksum.
    """

    def __init__(self, workdir: Workdir) -> None:
        local_folder(workdir.path)
        self.directory = workdir.checkpoints
        self._workdir = workdir
        own = jax.process_index()
        self._processes = MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
        )

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints on disk, including damaged ones, in ascending order.

        Raises UserError if the folder cannot be read.
        """
        return self._workdir.steps()

    def resolve(self, which: str) -> int:
        """Returns the step of a checkpoint: 'best', 'latest' or the step itself. Raises UserError if there is none."""
        steps = self.steps()
        if not steps:
            raise UserError(f"there is no checkpoint in {self.directory}; train first, or name another --workdir")
        if which == "latest":
            return steps[-1]
        if which == "best":
            return self._best(steps)
        step = checkpoint_step(which)
        if step in steps:
            return step
        raise UserError(f"there is no checkpoint '{which}' in {self.directory}; choose latest or one of {steps[-10:]}")

    def _best(self, steps: list[int]) -> int:
        try:
            scores = self._scores()
        except UserError as error:
            raise UserError(f"{error}, or choose --checkpoint latest") from None
        if scores is None:
            missing = self._workdir.metrics.name
            write_message(f"{self._workdir.path} has no {missing}, so its latest checkpoint, {steps[-1]}, is used")
            return steps[-1]
        evaluated = [step for step in steps if step in scores]
        if not evaluated:
            raise UserError(
                f"there is no checkpoint 'best' in {self.directory}, because none of them is evaluated yet; choose "
                f"latest or one of {steps[-10:]}"
            )
        chosen, best = (max(among, key=lambda step: (scores[step], step)) for among in (evaluated, scores))
        if best != chosen and self._keeps_best() and not (self.directory / str(best)).exists():
            write_message(f"{self.directory} lacks checkpoint {best}, the best one; checkpoint {chosen} is used")
        return chosen

    def _scores(self) -> Mapping[int, float] | None:
        """Returns {step: score} of the evaluated steps; None if it is unknown."""
        return read_scores(self._workdir.metrics)

    def _keeps_best(self) -> bool:
        try:
            config = self._workdir.read_config()
        except UserError:
            return False
        return config is not None and config.checkpoint.keep_best > 0

    def info(self, step: int) -> dict[str, Any]:
        """Returns the info saved with a checkpoint: the resolved config, class names and so on.

        Raises DamagedCheckpointError, or UserError if the files cannot be read or are of a newer version.
        """
        self._check_files(step)
        info = self._read_json(step, INFO)
        if not matches_checksum(info):
            raise self._damaged(step, "its info does not match its checksum")
        if info.get("format", FORMAT) > FORMAT:
            raise UserError(
                f"checkpoint {step} in {self.directory} has format {info['format']}, and this jaxft reads {FORMAT}; "
                "install the newest jaxft"
            )
        self._check_step(step, info.get("step", step))
        self._check_run(step, info)
        self.check_commit(step)
        if (self.directory / str(step) / TREE).exists():
            self._read_json(step, TREE)
        return info

    def check_commit(self, step: int) -> None:
        """Raises DamagedCheckpointError if Orbax's manager could not read a checkpoint's COMMIT: then it opens none."""
        if (self.directory / str(step) / COMMIT).exists():
            content = self._read_json(step, COMMIT)
            for key, kind in COMMIT_KEYS.items():
                if not isinstance(content.get(key), kind | None):
                    raise self._damaged(step, f"{COMMIT} has a {key} of another type")

    def _check_files(self, step: int, *, whole: bool = False) -> None:
        """Opens all files of a checkpoint: Orbax would wait for a FIFO for ever, and does not report causes.

        whole: reads them too. Raises DamagedCheckpointError if one is missing or not a file, or UserError if one cannot
        be read, as without permission: the checkpoint may be intact then.
        """
        folder = self.directory / str(step)
        try:
            for path in _files_below(folder):
                with open_regular(path) as file:
                    while whole and file.read(1 << 20):
                        pass
        except OSError as error:
            raise self._file_error(step, error) from error

    def _read_json(self, step: int, name: str) -> dict[str, Any]:
        try:
            return read_json(self.directory / str(step) / name)
        except OSError as error:
            raise self._file_error(step, error) from error
        except ValueError as error:
            raise self._damaged(step, f"{name}: {error}") from error

    def _file_error(self, step: int, error: OSError) -> UserError:
        folder = self.directory / str(step)
        text = f"{reason(error)}: {os.path.relpath(error.filename or folder, folder)}"
        return self._damaged(step, text) if error.errno in _NOT_A_FILE else self._unreadable(step, text)

    def _check_run(self, step: int, info: Mapping[str, Any]) -> None:
        """Raises DamagedCheckpointError if a checkpoint was saved by another run than that of DIR/config.json."""
        try:
            saved = resolve(info["config"]) if "config" in info else None
        except UserError:  # it has keys of another version
            return
        if saved and (difference := self._workdir.other_run(saved)):
            raise DamagedCheckpointError(
                f"checkpoint {step} in {self.directory} is of another run ({difference})",
                f"put the run's {self._workdir.config.name} back or move the checkpoint away, or {self._remedy(step)}",
            )

    def _check_step(self, step: int, saved: int) -> None:
        if saved != step:
            raise DamagedCheckpointError(
                f"{self.directory / str(step)} is not checkpoint {step} but {saved}",
                f"{'remove it' if saved in self.steps() else f'rename it to {saved}'}, or resume with {NEWEST_GOOD}",
            )

    def restore(self, step: int, abstract_state: StateT) -> StateT:
        """Returns the state, replicated on the local devices.

        Raises DamagedCheckpointError if an array differs, or UserError if the checkpoint has other arrays by design.
        """
        info = self.info(step)
        saved: dict[str, str] = info.get("arrays", {})
        self._check_arrays(step, info, abstract_state)
        state = self._read_state(step, jax.tree.map(lambda a: np.empty(a.shape, a.dtype), abstract_state))
        found = checksums(state)
        differ = sorted(name for name in saved.keys() | found.keys() if saved.get(name) != found.get(name))
        if differ:
            raise self._damaged(step, f"{len(differ)} of {len(saved)} arrays differ from what was saved: {differ[0]}")
        self._check_step(step, int(state.step))
        return replicate(state)

    def _check_arrays(self, step: int, info: Mapping[str, Any], abstract_state: State) -> None:
        """Raises UserError if a checkpoint was saved with arrays of other names, shapes or dtypes than expected.

        As its info is intact, another version of jaxft or of its dependencies has written it.
        """
        saved = {name: text.rpartition(" ")[0] for name, text in info.get("arrays", {}).items()}
        expected = {name: f"{array.dtype}{list(array.shape)}" for name, array in named_leaves(abstract_state)}
        if differ := sorted(name for name in saved | expected if saved.get(name) != expected.get(name)):
            name, versions = differ[0], info.get("versions", {})
            used = ", ".join(f"{package} {versions[package]}" for package in ("jaxft", "optax") if package in versions)
            kinds = f"{name}: {saved.get(name, 'none')} instead of {expected.get(name, 'none')}"
            raise UserError(
                f"checkpoint {step} in {self.directory} has other arrays than this version makes ({kinds}); use "
                f"{used or 'the version'} of its run"
            )

    def _read_state(self, step: int, target: StateT) -> StateT:
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=self._processes)
        folder = (self.directory / str(step) / "state").absolute()
        with ocp.Checkpointer(handler, multiprocessing_options=self._processes) as checkpointer:
            for attempt in range(2):  # a network disk may be unavailable for a moment
                try:
                    return checkpointer.restore(folder, args=ocp.args.StandardRestore(target))
                except MemoryError as error:
                    raise UserError(f"checkpoint {step} in {self.directory} does not fit into memory") from error
                except Exception as error:  # Orbax raises bare exceptions for damaged files
                    number = os_error(error)
                    if number and number not in _NOT_A_FILE:
                        raise self._unreadable(step, os.strerror(number)) from error
                    self._check_files(step, whole=True)
                    if attempt:
                        raise self._damaged(step, error) from error
        raise AssertionError

    def _damaged(self, step: int, cause: Exception | str) -> DamagedCheckpointError:
        text = f"checkpoint {step} in {self.directory} is damaged ({one_line(cause, 60)})"
        return DamagedCheckpointError(text, self._remedy(step))

    def _unreadable(self, step: int, cause: str) -> UserError:
        return UserError(f"checkpoint {step} in {self.directory} cannot be read ({cause}); fix that and try again")

    def _remedy(self, step: int) -> str:
        rest = [other for other in self.steps() if other != step]
        others = f"use --checkpoint {rest[-1]}, or " if rest else ""
        return f"{others}resume with {NEWEST_GOOD}"


def _files_below(folder: Path) -> Iterator[Path]:
    """Yields all paths below a folder that are not folders, each folder once. Raises OSError."""
    waiting, seen = [folder], set[tuple[int, int]]()
    while waiting:
        current = waiting.pop()
        status = current.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(current) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    waiting.append(Path(entry.path))
                else:
                    yield Path(entry.path)


def os_error(error: BaseException | None) -> int | None:
    """Returns the errno behind an exception of Orbax or TensorStore; TensorStore writes it into its messages."""
    while error:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if match := re.search(r"(?:OS error |os_error_code=')(\d+)", str(error)):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None


def checksums(tree: Any) -> dict[str, str]:
    """Returns {path: dtype, shape and CRC-32} of each array."""
    return {
        name: f"{array.dtype}{list(array.shape)} {zlib.crc32(np.ascontiguousarray(array).data.cast('B')):08x}"
        for name, array in named_leaves(tree)
    }


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
