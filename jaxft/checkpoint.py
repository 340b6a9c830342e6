"""Checkpoints through Orbax: the training state and, as JSON, all that is needed to use it."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxft.config import flatten, resolve
from jaxft.errors import UserError
from jaxft.optimizer import make_optimizer
from jaxft.parts import freeze
from jaxft.resnet import ResNet, make_model
from jaxft.steps import TrainState, abstract_train_state, replicated_sharding


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics["accuracy"]


class Checkpoints:
    """DIR/checkpoints/STEP/{state,info}; the latest and those of the highest accuracy are kept.

    `save` returns once the state is copied to the host and writes while training goes on; `close` waits for it.
    """

    def __init__(self, workdir: Path, keep_latest: int = 1, keep_best: int = 1) -> None:
        self.directory = workdir / "checkpoints"
        policies = [LatestN(keep_latest)] + ([BestN(get_metric_fn=_accuracy, n=keep_best)] if keep_best else [])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies), best_fn=_accuracy, best_mode="max"
        )
        self._manager = ocp.CheckpointManager(self.directory.absolute(), options=options)

    def save(self, state: TrainState, info: dict[str, Any], accuracy: float) -> None:
        step = int(state.step)
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info)),
            metrics={"accuracy": accuracy},
        )
        if not saved:  # Orbax keeps silent about a step that is not above the latest
            raise RuntimeError(f"Orbax did not save step {step} in {self.directory}")

    def latest_step(self) -> int:
        return self.resolve("latest")

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def resolve(self, which: str) -> int:
        """The step of 'best', 'latest' or a step's number; UserError where there is none."""
        steps = self.steps()
        if not steps:
            raise UserError(f"there is no checkpoint in {self.directory}; train first, or name another --workdir")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = self._manager.best_step()
            return steps[-1] if best is None else best
        if which.isdecimal() and int(which) in steps:
            return int(which)
        raise UserError(f"there is no checkpoint '{which}' in {self.directory}; there are best, latest, {steps}")

    def info(self, step: int) -> dict[str, Any]:
        """What `save` was given: the resolved config, class names and so on."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore()))["info"]
        except Exception as error:  # Orbax raises bare exceptions for damaged files
            raise self._damaged(step, error) from error

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The state on every local device, whatever number of devices it was saved from."""
        sharding = replicated_sharding()
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), abstract_state)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
        except Exception as error:  # Orbax raises bare exceptions for damaged files
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: Exception) -> UserError:
        return UserError(
            f"checkpoint {step} in {self.directory} cannot be restored ({str(error)[:200]}); move it away to go on "
            f"from another of {self.steps()}"
        )

    def close(self) -> None:
        """Waits until what is being written is on disk."""
        self._manager.close()


def has_checkpoint(workdir: Path) -> bool:
    return any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*"))


class LoadedCheckpoint(NamedTuple):
    step: int
    info: dict[str, Any]  # config, class_names, preprocessing, weights, versions
    model: ResNet
    state: TrainState  # on every local device


def load_checkpoint(workdir: Path, which: str) -> LoadedCheckpoint:
    """A checkpoint and all that it needs to be used: 'best', 'latest' or a step's number."""
    if not has_checkpoint(workdir):
        raise UserError(f"there is no checkpoint in {workdir}; train first, or name another --workdir")
    with closing(Checkpoints(workdir)) as checkpoints:
        step = checkpoints.resolve(which)
        info = checkpoints.info(step)
        config = resolve(info["config"])
        model = freeze(make_model(config.model, len(info["class_names"])), config.optimizer, config.num_epochs)
        tx = make_optimizer(config.optimizer, steps_per_epoch=1, num_epochs=1)  # for the structure of its state
        return LoadedCheckpoint(step, info, model, checkpoints.restore(step, abstract_train_state(model, tx)))


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Raises UserError where the workdir belongs to another config; the data may have moved to another data.dir."""
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
    here = flatten(config)
    differ = [
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for key in here | there
        if key != "data.dir" and there.get(key) != here.get(key)
    ]
    if differ:
        raise UserError(f"{workdir} belongs to another config ({'; '.join(differ)}); name another --workdir")


def write_config(config: ConfigDict, workdir: Path) -> None:
    """DIR/config.json; the workdir appears with it."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        partial = workdir / "config.json.partial"
        partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        partial.replace(workdir / "config.json")
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error}") from None
