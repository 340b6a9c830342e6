"""Saves and restores checkpoints with Orbax: a pytree and, as JSON, everything needed to use it."""

import errno
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import PreservationContext, PreservationPolicy
from orbax.checkpoint.options import AsyncOptions, MultiprocessingOptions

from jaxft.config import resolve
from jaxft.data.batches import replicate
from jaxft.errors import UserError, write_message
from jaxft.files import matches_checksum, open_regular, read_json, reason, with_checksum
from jaxft.main_process import is_main_process
from jaxft.run.metrics_file import MetricsFile, read_accuracy
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


class NotFiniteError(Exception):
    """A NaN or an infinity at `step`, caused by the state after step `made_by`."""

    def __init__(self, what: str, step: int, made_by: int) -> None:
        super().__init__(what)
        self.step, self.made_by = step, made_by


class DamagedCheckpointError(UserError):
    """A checkpoint's files are missing or wrong, or it is not of the step or run that its path says."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


@dataclass
class _LatestAndBest(PreservationPolicy):
    latest: int
    best: int
    accuracy: Mapping[int, float]  # {step: accuracy} of the evaluated steps

    def should_preserve(self, checkpoints: Sequence[Any], *, context: PreservationContext) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        ranked = sorted(self.accuracy.keys() & steps, key=lambda step: (-self.accuracy[step], -step))
        kept = {*steps[-self.latest :], *ranked[: self.best]}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints DIR/checkpoints/STEP/{state,info}: the latest and the most accurate ones are kept.

    A state is saved as host arrays, each with a checksum, so any number of processes and devices can restore it.
    Process 0 writes in the background. metrics: provides the accuracies, and is flushed to disk up to a step before
    that step's checkpoint is written. Without it the checkpoints are read-only.
    """

    def __init__(
        self, workdir: Workdir, metrics: MetricsFile | None = None, keep_latest: int = 1, keep_best: int = 1
    ) -> None:
        local_folder(workdir.path)
        self.directory = workdir.checkpoints
        self._workdir = workdir
        self._metrics = metrics
        self._writes = metrics is not None and is_main_process()
        self._policy = _LatestAndBest(keep_latest, keep_best, metrics.accuracy if metrics else {})
        self._saving: int | None = None
        own = jax.process_index()
        self._processes = MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
        )
        self._manager: ocp.CheckpointManager | None = None
        if self._writes:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                text = f"{self.directory} cannot be written: {reason(error)}; name another --workdir"
                raise UserError(text) from None
            if not self.steps():
                self._open_manager()

    def _open_manager(self) -> ocp.CheckpointManager:
        """Returns Orbax's manager, which writes and deletes checkpoints. It reads the COMMIT file of each of them."""
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                create=False,
                # If creating a folder in the background fails, threads wait for it for minutes.
                async_options=AsyncOptions(create_directories_asynchronously=False),
                multiprocessing_options=self._processes,
            )
            self._manager = ocp.CheckpointManager(self.directory.absolute(), options=options)
            if others := sorted({*self._manager.all_steps()} - {*self.steps()}):  # it saves no step below its latest
                raise UserError(f"{self.directory / str(others[0])} is not a checkpoint of a run; move it away")
        return self._manager

    def save(self, state: State, info: dict[str, Any]) -> None:
        """Starts writing a checkpoint. A failure is reported on stderr and leaves the existing checkpoints unchanged.

        Raises NotFiniteError if the state holds a NaN or an infinity.
        """
        self.wait()
        host_state = to_host(state)
        step = int(host_state.step)
        if names := not_finite(host_state):
            raise NotFiniteError(f"{names[0]} is not finite", step, made_by=step)
        if not self._metrics or not self._writes or step in self.steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(host_state),
            info=ocp.args.JsonSave(
                with_checksum(info | {"format": FORMAT, "step": step, "arrays": checksums(host_state)})
            ),
        )
        self._saving = step
        manager = self._open_manager()
        try:
            self._metrics.flush()
            manager.reload()  # it loses track of the existing steps when a save fails
            saved = manager.save(step, args=args)
        except Exception as error:  # Orbax wraps file system errors in exceptions of any kind
            self._report_failure(error)
        else:
            if not saved:  # Orbax silently ignores a step that is not above the latest
                raise RuntimeError(f"Orbax did not save step {step} in {self.directory}")

    def poll(self) -> None:
        """Reports a background save that has failed. Does not block."""
        if self._manager and self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Blocks until the checkpoint being written is on disk or has failed."""
        try:
            if self._manager:
                self._manager.wait_until_finished()
        except Exception as error:
            self._report_failure(error)
        self._saving = None

    def _report_failure(self, error: Exception) -> None:
        remaining = f"checkpoint {self.steps()[-1]} stays" if self.steps() else "there is none yet"
        number = _os_error(error)
        cause = os.strerror(number) if number else " ".join(str(error).split())[:150]
        write_message(
            f"\ncheckpoint {self._saving} could not be written ({cause}); {remaining}; trying again at the next"
        )
        self._saving = None
        for partial in self.directory.glob("*.orbax-checkpoint-tmp*"):  # to make room
            shutil.rmtree(partial, ignore_errors=True)

    def finish(self, state: State, info: dict[str, Any]) -> None:
        """Blocks until the checkpoint of this state is on disk; if its save failed, tries again.

        Raises UserError if it still cannot be written.
        """
        self.wait()
        if not self._writes or int(state.step) in self.steps():
            return
        self.save(state, info)
        self.wait()
        if int(state.step) not in self.steps():
            raise UserError(
                f"the last checkpoint could not be written in {self.directory}; make room or fix the folder, then run "
                "the same command again"
            )

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints on disk, including damaged ones, in ascending order.

        Raises UserError if the folder cannot be read, except in a run, whose next save may succeed.
        """
        try:
            return self._workdir.steps()
        except UserError:
            if self._manager:
                return []
            raise

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
            accuracy = self._metrics.accuracy if self._metrics else read_accuracy(self._workdir.metrics)
        except UserError as error:
            raise UserError(f"{error}, or choose --checkpoint latest") from None
        if accuracy is None:
            missing = self._workdir.metrics.name
            write_message(f"{self._workdir.path} has no {missing}, so its latest checkpoint, {steps[-1]}, is used")
            return steps[-1]
        evaluated = [step for step in steps if step in accuracy]
        if not evaluated:
            raise UserError(
                f"there is no checkpoint 'best' in {self.directory}, because none of them is evaluated yet; choose "
                f"latest or one of {steps[-10:]}"
            )
        chosen, best = (max(among, key=lambda step: (accuracy[step], step)) for among in (evaluated, accuracy))
        if best != chosen and self._keeps_best() and not (self.directory / str(best)).exists():
            write_message(f"{self.directory} lacks checkpoint {best}, the best one; checkpoint {chosen} is used")
        return chosen

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
        self._check_commit(step)
        if (self.directory / str(step) / TREE).exists():
            self._read_json(step, TREE)
        return info

    def _check_commit(self, step: int) -> None:
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
        expected = {name: f"{array.dtype}{list(array.shape)}" for name, array in _named_leaves(abstract_state)}
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
                    number = _os_error(error)
                    if number and number not in _NOT_A_FILE:
                        raise self._unreadable(step, os.strerror(number)) from error
                    self._check_files(step, whole=True)
                    if attempt:
                        raise self._damaged(step, error) from error
        raise AssertionError

    def restore_latest(self, abstract_state: StateT, on_damage: str) -> tuple[dict[str, Any], StateT]:
        """Returns (info, state) of the latest checkpoint.

        on_damage: 'refuse' raises DamagedCheckpointError; 'newest_good' moves damaged checkpoints aside.
        """
        if self._writes and on_damage == "newest_good":
            self._set_damaged_aside(abstract_state)
        step = int(multihost_utils.broadcast_one_to_all(np.int32(self.steps()[-1])))
        result = self.info(step), self.restore(step, abstract_state)
        if self._writes:
            for other in self.steps():
                self._check_commit(other)
            self._open_manager()
        return result

    def _set_damaged_aside(self, abstract_state: State) -> None:
        """Moves aside the checkpoints that are damaged and newer than the newest good one.

        Raises UserError, and moves nothing, if there is no good one or if one cannot be read: the cause may then be
        outside the checkpoints.
        """
        damaged: dict[int, DamagedCheckpointError] = {}
        for step in reversed(self.steps()):
            try:
                self.restore(step, abstract_state)
                break
            except DamagedCheckpointError as error:
                damaged[step] = error
        else:
            raise UserError(
                f"there is no good checkpoint in {self.directory}, and none was moved: {damaged[max(damaged)].reason}; "
                "train in another --workdir"
            )
        for step in self.steps():  # Orbax reads this file of all checkpoints
            try:
                if step not in damaged:
                    self._check_commit(step)
            except DamagedCheckpointError as error:
                damaged[step] = error
        for step, problem in damaged.items():
            write_message(f"{problem.reason}; moved to {self.set_aside(step)}")

    def _damaged(self, step: int, cause: Exception | str) -> DamagedCheckpointError:
        text = " ".join(str(cause).split())[:60]
        return DamagedCheckpointError(f"checkpoint {step} in {self.directory} is damaged ({text})", self._remedy(step))

    def _unreadable(self, step: int, cause: str) -> UserError:
        return UserError(f"checkpoint {step} in {self.directory} cannot be read ({cause}); fix that and try again")

    def _remedy(self, step: int) -> str:
        rest = [other for other in self.steps() if other != step]
        others = f"use --checkpoint {rest[-1]}, or " if rest else ""
        return f"{others}resume with {NEWEST_GOOD}"

    def set_aside(self, step: int) -> Path:
        """Moves a checkpoint to DIR/damaged_checkpoints and returns its new path. Raises UserError if it cannot."""
        target = self._workdir.damaged_checkpoints / str(step)
        while target.exists():
            target = target.with_name(f"{target.name}_")
        if self._writes:
            try:
                target.parent.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(target)
            except OSError as error:
                raise UserError(f"{self.directory / str(step)} cannot be moved to {target}: {reason(error)}") from None
            if self._manager:
                self._manager.reload()
        return target

    def close(self) -> None:
        self.wait()
        if self._manager:
            self._manager.close()


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


def _os_error(error: BaseException | None) -> int | None:
    """Returns the errno behind an exception of Orbax or TensorStore; TensorStore writes it into its messages."""
    while error:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if match := re.search(r"(?:OS error |os_error_code=')(\d+)", str(error)):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None


def to_host(tree: Any) -> Any:
    """Copies a replicated pytree to the host; zero-copy on CPU devices."""
    return jax.tree.map(lambda array: np.asarray(array.addressable_shards[0].data), tree)


def checksums(tree: Any) -> dict[str, str]:
    """Returns {path: dtype, shape and CRC-32} of each array."""
    return {
        name: f"{array.dtype}{list(array.shape)} {zlib.crc32(np.ascontiguousarray(array).data.cast('B')):08x}"
        for name, array in _named_leaves(tree)
    }


def not_finite(tree: Any) -> list[str]:
    """Returns the paths of the arrays that hold a NaN or an infinity."""
    return [name for name, array in _named_leaves(tree) if not np.isfinite(array).all()]


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
