"""Saves and restores checkpoints with Orbax: a pytree and, as JSON, everything needed to use it."""

import json
import logging
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import PreservationContext, PreservationPolicy
from orbax.checkpoint.options import AsyncOptions, MultiprocessingOptions

from jaxft.data.batches import replicate
from jaxft.errors import UserError
from jaxft.main_process import is_main_process
from jaxft.run.metrics_file import MetricsFile
from jaxft.run.workdir import Workdir


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
    """A checkpoint that cannot be read, or whose arrays differ from those that were saved."""

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
        self.directory = workdir.checkpoints
        self._damaged_directory = workdir.damaged_checkpoints
        self._writes = metrics is not None and is_main_process()
        self._metrics = metrics or MetricsFile(workdir.metrics)
        self._policy = _LatestAndBest(keep_latest, keep_best, self._metrics.accuracy)
        self._saving: int | None = None
        if self._writes:
            self.directory.mkdir(parents=True, exist_ok=True)
        own = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            create=False,
            # If creating a folder in the background fails, threads wait for it for minutes.
            async_options=AsyncOptions(create_directories_asynchronously=False),
            read_only=not self._writes,
            save_interval_steps=int(self._writes),  # Orbax warns that it changes any other value if it only reads
            multiprocessing_options=MultiprocessingOptions(
                primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
            ),
        )
        with _quiet("absl"):  # Orbax warns that the folder is read-only, as it was asked for
            self._manager = ocp.CheckpointManager(self.directory.absolute(), options=options)

    def save(self, state: State, info: dict[str, Any]) -> None:
        """Starts writing a checkpoint. A failure is reported on stderr and leaves the existing checkpoints unchanged.

        Raises NotFiniteError if the state holds a NaN or an infinity.
        """
        self.wait()
        host_state = to_host(state)
        step = int(host_state.step)
        if names := not_finite(host_state):
            raise NotFiniteError(f"{names[0]} is not finite", step, made_by=step)
        if not self._writes or step in self.steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(host_state),
            info=ocp.args.JsonSave(_seal(info | {"arrays": checksums(host_state)})),
        )
        self._saving = step
        try:
            self._metrics.flush()
            self._manager.reload()  # it loses track of the existing steps when a save fails
            saved = self._manager.save(step, args=args)
        except Exception as error:  # Orbax wraps file system errors in exceptions of any kind
            self._report_failure(error)
        else:
            if not saved:  # Orbax silently ignores a step that is not above the latest
                raise RuntimeError(f"Orbax did not save step {step} in {self.directory}")

    def poll(self) -> None:
        """Reports a background save that has failed. Does not block."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Blocks until the checkpoint being written is on disk or has failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._report_failure(error)
        self._saving = None

    def _report_failure(self, error: Exception) -> None:
        remaining = f"checkpoint {self.steps()[-1]} stays" if self.steps() else "there is none yet"
        print(
            f"\ncheckpoint {self._saving} could not be written ({' '.join(str(error).split())[:150]}); {remaining}; "
            "trying again at the next",
            file=sys.stderr,
            flush=True,
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
        """Returns the steps of the checkpoints on disk, including damaged ones, in ascending order."""
        on_disk = {int(path.name) for path in self.directory.glob("*") if path.name.isdecimal()}
        return sorted(on_disk)

    def resolve(self, which: str) -> int:
        """Returns the step of a checkpoint: 'best', 'latest' or the step itself. Raises UserError if there is none."""
        steps = self.steps()
        if not steps:
            raise UserError(f"there is no checkpoint in {self.directory}; train first, or name another --workdir")
        if which == "latest":
            return steps[-1]
        accuracy = self._metrics.accuracy
        evaluated = [step for step in steps if step in accuracy]
        if which == "best" and evaluated:
            return max(evaluated, key=lambda step: (accuracy[step], step))
        if which.isdecimal() and int(which) in steps:
            return int(which)
        raise UserError(f"there is no checkpoint '{which}' in {self.directory}; choose latest or one of {steps}")

    def info(self, step: int) -> dict[str, Any]:
        """Returns the info saved with a checkpoint: the resolved config, class names and so on."""
        try:
            info = self._manager.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore()))["info"]
        except Exception as error:  # Orbax raises bare exceptions for damaged files
            raise self._damaged(step, error) from error
        if info != _seal(info):
            raise self._damaged(step, "its info does not match its checksum")
        return info

    def restore(self, step: int, abstract_state: StateT) -> StateT:
        """Returns the state, replicated on the local devices. Raises DamagedCheckpointError if an array differs."""
        saved = self.info(step)["arrays"]
        target = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), abstract_state)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            state = self._manager.restore(step, args=args)["state"]
        except Exception as error:
            raise self._damaged(step, error) from error
        found = checksums(state)
        differ = sorted(name for name in saved.keys() | found.keys() if saved.get(name) != found.get(name))
        if differ:
            raise self._damaged(step, f"{len(differ)} of {len(saved)} arrays differ from what was saved: {differ[0]}")
        return replicate(state)

    def restore_latest(self, abstract_state: StateT, on_damage: str) -> tuple[dict[str, Any], StateT]:
        """Returns (info, state) of the latest checkpoint.

        on_damage: 'refuse' raises DamagedCheckpointError; 'newest_good' moves damaged checkpoints out of the way.
        """
        if self._writes and on_damage == "newest_good":
            self._set_damaged_aside(abstract_state)
        step = int(multihost_utils.broadcast_one_to_all(np.int32(self.steps()[-1])))
        return self.info(step), self.restore(step, abstract_state)

    def _set_damaged_aside(self, abstract_state: State) -> None:
        """Moves the latest checkpoint aside until a good one is the latest. Raises UserError if there is none."""
        while self.steps():
            step = self.steps()[-1]
            try:
                self.restore(step, abstract_state)
                return
            except DamagedCheckpointError as error:
                print(f"{error.reason}; moved to {self.set_aside(step)}", file=sys.stderr, flush=True)
        raise UserError(f"there is no good checkpoint in {self.directory}; train in another --workdir")

    def _damaged(self, step: int, error: Exception | str) -> DamagedCheckpointError:
        reason = f"checkpoint {step} in {self.directory} is damaged ({' '.join(str(error).split())[:60]})"
        rest = [other for other in self.steps() if other != step]
        others = f"use --checkpoint {rest[-1]}, or " if rest else ""
        return DamagedCheckpointError(
            reason,
            f"{others}resume from the newest good one with --config.checkpoint.on_damage=newest_good",
        )

    def set_aside(self, step: int) -> Path:
        """Moves a checkpoint to DIR/damaged_checkpoints and returns its new path."""
        target = self._damaged_directory / str(step)
        while target.exists():
            target = target.with_name(f"{target.name}_")
        if self._writes:
            target.parent.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(target)
            self._manager.reload()
        return target

    def close(self) -> None:
        self.wait()
        self._manager.close()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silences a logger's warnings for a while."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def to_host(tree: Any) -> Any:
    """Copies a replicated pytree to the host; zero-copy on CPU devices."""
    return jax.tree.map(lambda array: np.asarray(array.addressable_shards[0].data), tree)


def checksums(tree: Any) -> dict[str, str]:
    """Returns {path: dtype, shape and CRC-32} of each array."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{array.dtype}{list(array.shape)} {zlib.crc32(np.ascontiguousarray(array).data.cast('B')):08x}"
        )
        for path, array in jax.tree_util.tree_leaves_with_path(tree)
    }


def not_finite(tree: Any) -> list[str]:
    """Returns the paths of the arrays that hold a NaN or an infinity."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, array in jax.tree_util.tree_leaves_with_path(tree)
        if not np.isfinite(array).all()
    ]


def _seal(info: dict[str, Any]) -> dict[str, Any]:
    """Returns `info` after a round trip through JSON, with a CRC-32 of everything else."""
    text = json.dumps({key: value for key, value in info.items() if key != "crc32"}, sort_keys=True)
    return json.loads(text) | {"crc32": zlib.crc32(text.encode())}
