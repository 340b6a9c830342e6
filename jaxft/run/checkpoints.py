"""Writes checkpoints with Orbax, each a pytree and the JSON that is needed to use it, and deletes old ones."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import PreservationContext, PreservationPolicy
from orbax.checkpoint.options import AsyncOptions

from jaxft.errors import UserError, one_line, write_message
from jaxft.files import reason, with_checksum
from jaxft.main_process import is_main_process
from jaxft.run.checkpoint_reader import (
    FORMAT,
    CheckpointReader,
    DamagedCheckpointError,
    State,
    StateT,
    checksums,
    named_leaves,
    os_error,
)
from jaxft.run.metrics_file import MetricsFile
from jaxft.run.workdir import Workdir


class NotFiniteError(Exception):
    """A NaN or an infinity at `step`, caused by the state after step `made_by`."""

    def __init__(self, what: str, step: int, made_by: int) -> None:
        super().__init__(what)
        self.step, self.made_by = step, made_by


@dataclass
class _LatestAndBest(PreservationPolicy):
    latest: int
    best: int
    scores: Mapping[int, float]  # {step: score} of the evaluated steps

    def should_preserve(self, checkpoints: Sequence[Any], *, context: PreservationContext) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        ranked = sorted(self.scores.keys() & steps, key=lambda step: (-self.scores[step], -step))
        kept = {*steps[-self.latest :], *ranked[: self.best]}
        return [step in kept for step in steps]


class Checkpoints(CheckpointReader):
    """The checkpoints of a run that trains: the latest ones and those with the highest scores are kept.

    A state is saved as host arrays, each with a checksum, so any number of processes and devices can restore it.
    Process 0 writes in the background. metrics: provides the scores, and is flushed to disk up to a step before
    that step's checkpoint is written.
    """

    def __init__(self, workdir: Workdir, metrics: MetricsFile, keep_latest: int = 1, keep_best: int = 1) -> None:
        super().__init__(workdir)
        self._metrics = metrics
        self._writes = is_main_process()
        self._policy = _LatestAndBest(keep_latest, keep_best, metrics.scores)
        self._saving: int | None = None
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
        if not self._writes or step in self.steps():
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
        number = os_error(error)
        cause = os.strerror(number) if number else one_line(error, 150)
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
        """Returns the steps on disk; none if the folder cannot be read, since the next save may succeed."""
        try:
            return super().steps()
        except UserError:
            if self._manager:
                return []
            raise

    def _scores(self) -> Mapping[int, float]:
        return self._metrics.scores

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
                self.check_commit(other)
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
            newest = damaged[max(damaged)]
            raise UserError(
                f"there is no good checkpoint in {self.directory}, and nothing was moved: {newest.reason}; train in "
                "another --workdir"
            )
        for step in self.steps():  # Orbax reads this file of all checkpoints
            try:
                if step not in damaged:
                    self.check_commit(step)
            except DamagedCheckpointError as error:
                damaged[step] = error
        for step, problem in damaged.items():
            write_message(f"{problem.reason}; moved to {self.set_aside(step)}")

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


def to_host(tree: Any) -> Any:
    """Copies a replicated pytree to the host; zero-copy on CPU devices."""
    return jax.tree.map(lambda array: np.asarray(array.addressable_shards[0].data), tree)


def not_finite(tree: Any) -> list[str]:
    """Returns the paths of the arrays that hold a NaN or an infinity."""
    return [name for name, array in named_leaves(tree) if not np.isfinite(array).all()]
