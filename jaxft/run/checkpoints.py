"""Checkpoints through Orbax: the training state and, as JSON, all that is needed to use it."""

import json
import logging
import shutil
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import PreservationContext, PreservationPolicy
from orbax.checkpoint.options import AsyncOptions, MultiprocessingOptions

from jaxft.data.batches import replicate
from jaxft.errors import UserError
from jaxft.run.metrics_file import MetricsFile
from jaxft.training.state import TrainState

for _name in ("absl", "asyncio"):  # Orbax's tracebacks, of what is told here in one line
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def _quieten_orbax() -> None:
    """Once a read or write fails, those still under way end in an event loop that is closed, with a traceback each."""
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook

    def of_loop(error: BaseException | None) -> bool:
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    def except_loop(kind: Any, error: BaseException, traceback: Any) -> None:
        if not of_loop(error):
            excepthook(kind, error, traceback)

    def unraisable_except_loop(unraisable: Any) -> None:
        if not of_loop(unraisable.exc_value):
            unraisablehook(unraisable)

    sys.excepthook, sys.unraisablehook = except_loop, unraisable_except_loop


_quieten_orbax()


class NotFiniteError(Exception):
    """A NaN or an infinity after `step`, from what the steps up to `made_by` have left."""

    def __init__(self, what: str, step: int, made_by: int) -> None:
        super().__init__(what)
        self.step, self.made_by = step, made_by


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be read, or whose arrays are not what was saved."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


@dataclass
class _LatestAndBest(PreservationPolicy):
    latest: int
    best: int
    accuracy: Mapping[int, float]  # by step, of those that were evaluated

    def should_preserve(self, checkpoints: Sequence[Any], *, context: PreservationContext) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        ranked = sorted(self.accuracy.keys() & steps, key=lambda step: (-self.accuracy[step], -step))
        kept = {*steps[-self.latest :], *ranked[: self.best]}
        return [step in kept for step in steps]


class Checkpoints:
    """DIR/checkpoints/STEP/{state,info}; the latest and those of the highest accuracy are kept.

    A state is kept as host arrays with a checksum of each: it can be restored on any devices, by any number of
    processes. Process 0 writes, while training goes on. `metrics` holds the accuracies, and is on disk up to a step
    before that step's checkpoint is; without it the checkpoints are only read.
    """

    def __init__(
        self, workdir: Path, metrics: MetricsFile | None = None, keep_latest: int = 1, keep_best: int = 1
    ) -> None:
        self.directory = workdir / "checkpoints"
        self._writes = metrics is not None and jax.process_index() == 0
        self._metrics = metrics or MetricsFile(workdir / "metrics.jsonl")
        self._policy = _LatestAndBest(keep_latest, keep_best, self._metrics.accuracy)
        self._saving: int | None = None
        if self._writes:
            self.directory.mkdir(parents=True, exist_ok=True)
        own = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            create=False,
            # Created in the background, a folder that cannot be leaves threads waiting for it for minutes.
            async_options=AsyncOptions(create_directories_asynchronously=False),
            read_only=not self._writes,
            multiprocessing_options=MultiprocessingOptions(
                primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
            ),
        )
        self._manager = ocp.CheckpointManager(self.directory.absolute(), options=options)

    def save(self, state: TrainState, info: dict[str, Any]) -> None:
        """Where it cannot be written, that is told on stderr and the checkpoints that are there stay.

        Raises NotFiniteError where the state holds a NaN or an infinity.
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
            self._manager.reload()  # after a save that failed it knows too little
            saved = self._manager.save(step, args=args)
        except Exception as error:  # Orbax wraps what the file system says in exceptions of any kind
            self._failed(error)
        else:
            if not saved:  # Orbax keeps silent about a step that is not above the latest
                raise RuntimeError(f"Orbax did not save step {step} in {self.directory}")

    def poll(self) -> None:
        """Tells of a save that failed, as soon as it has."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until what is being written is on disk."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error)
        self._saving = None

    def _failed(self, error: Exception) -> None:
        there = f"checkpoint {self.steps()[-1]} stays" if self.steps() else "there is none yet"
        print(
            f"\ncheckpoint {self._saving} could not be written ({' '.join(str(error).split())[:300]}); {there}; "
            "trying again at the next",
            file=sys.stderr,
            flush=True,
        )
        self._saving = None
        for partial in self.directory.glob("*.orbax-checkpoint-tmp*"):  # to make room
            shutil.rmtree(partial, ignore_errors=True)

    def finish(self, state: TrainState, info: dict[str, Any]) -> None:
        """Waits until the checkpoint of this state is on disk; raises UserError where that cannot be."""
        for _ in range(2):
            self.wait()
            if not self._writes or int(state.step) in self.steps():
                return
            self.save(state, info)
        self.wait()
        if int(state.step) not in self.steps():
            raise UserError(
                f"the last checkpoint could not be written in {self.directory}; make room or mend it, then run the "
                "same command again"
            )

    def steps(self) -> list[int]:
        """Those on disk, damaged ones too, but for one that is being written."""
        on_disk = {int(path.name) for path in self.directory.glob("*") if path.name.isdecimal()}
        return sorted(on_disk)

    def resolve(self, which: str) -> int:
        """The step of 'best', 'latest' or a step's number; UserError where there is none."""
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
        raise UserError(f"there is no checkpoint '{which}' in {self.directory}; there are latest, {steps}")

    def info(self, step: int) -> dict[str, Any]:
        """What `save` was given: the resolved config, class names and so on."""
        try:
            info = self._manager.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore()))["info"]
        except Exception as error:  # Orbax raises bare exceptions for damaged files
            raise self._damaged(step, error) from error
        if info != _seal(info):
            raise self._damaged(step, "its info does not match its checksum")
        return info

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The state on every local device, each array verified; raises DamagedCheckpointError."""
        saved = self.info(step)["arrays"]
        target = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), abstract_state)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            state = self._manager.restore(step, args=args)["state"]
        except Exception as error:
            raise self._damaged(step, error) from error
        there = checksums(state)
        differ = sorted(name for name in saved.keys() | there.keys() if saved.get(name) != there.get(name))
        if differ:
            raise self._damaged(step, f"{len(differ)} of {len(saved)} arrays differ from what was saved: {differ[0]}")
        return replicate(state)

    def restore_latest(self, abstract_state: TrainState, on_damage: str) -> tuple[dict[str, Any], TrainState]:
        """Info and state. on_damage: 'refuse' raises DamagedCheckpointError, 'newest_good' sets damaged ones aside."""
        if self._writes and on_damage == "newest_good":
            self._set_damaged_aside(abstract_state)
        step = int(multihost_utils.broadcast_one_to_all(np.int32(self.steps()[-1])))
        return self.info(step), self.restore(step, abstract_state)

    def _set_damaged_aside(self, abstract_state: TrainState) -> None:
        """Until the latest is good, or none is there."""
        while self.steps():
            step = self.steps()[-1]
            try:
                self.restore(step, abstract_state)
                return
            except DamagedCheckpointError as error:
                print(f"{error.reason}; moved to {self.set_aside(step)}", file=sys.stderr, flush=True)
        raise UserError(f"there is no good checkpoint in {self.directory}; train in another --workdir")

    def _damaged(self, step: int, error: Exception | str) -> DamagedCheckpointError:
        reason = f"checkpoint {step} in {self.directory} is damaged ({str(error)[:200]})"
        return DamagedCheckpointError(
            reason,
            f"there are {self.steps()}: evaluate another with --checkpoint, or train on from the newest good one with "
            "--config.checkpoint.on_damage=newest_good",
        )

    def set_aside(self, step: int) -> Path:
        """Moves a checkpoint out of the way; where it is then."""
        target = self.directory.with_name("damaged_checkpoints") / str(step)
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


def to_host(tree: Any) -> Any:
    """Of what is the same on every device: one device's copy, which is shared with it where that is the host."""
    return jax.tree.map(lambda array: np.asarray(array.addressable_shards[0].data), tree)


def checksums(tree: Any) -> dict[str, str]:
    """Type, shape and CRC-32 of each array, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{array.dtype}{list(array.shape)} {zlib.crc32(np.ascontiguousarray(array).data.cast('B')):08x}"
        )
        for path, array in jax.tree_util.tree_leaves_with_path(tree)
    }


def not_finite(tree: Any) -> list[str]:
    """The paths of arrays that hold a NaN or an infinity."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, array in jax.tree_util.tree_leaves_with_path(tree)
        if not np.isfinite(array).all()
    ]


def _seal(info: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, with a checksum of all the rest."""
    text = json.dumps({key: value for key, value in info.items() if key != "crc32"}, sort_keys=True)
    return json.loads(text) | {"crc32": zlib.crc32(text.encode())}
