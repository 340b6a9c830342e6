"""Restores a checkpoint as a model with its state."""

from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.config import resolve
from jaxft.errors import UserError
from jaxft.models.partition import freeze
from jaxft.models.resnet import ResNet, make_model
from jaxft.run.checkpoints import Checkpoints
from jaxft.run.remote_workdir import display_name, reading_folder
from jaxft.run.workdir import has_checkpoint
from jaxft.training.optimizer import make_optimizer
from jaxft.training.state import TrainState, abstract_train_state


class LoadedCheckpoint(NamedTuple):
    step: int
    info: dict[str, Any]  # config, class_names, preprocessing, weights, versions
    model: ResNet
    state: TrainState  # on every local device


def load_checkpoint(workdir: str | Path, which: str) -> LoadedCheckpoint:
    """A checkpoint and all that it needs to be used: 'best', 'latest' or a step's number."""
    workdir = reading_folder(workdir)
    if not has_checkpoint(workdir):
        raise UserError(f"there is no checkpoint in {display_name(workdir)}; train first, or name another --workdir")
    with closing(Checkpoints(workdir)) as checkpoints:
        step = checkpoints.resolve(which)
        info = checkpoints.info(step)
        config = resolve(info["config"])
        model = freeze(make_model(config.model, len(info["class_names"])), config.optimizer, config.num_epochs)
        tx = make_optimizer(config.optimizer, steps_per_epoch=1, num_epochs=1)  # for the structure of its state
        abstract_state = abstract_train_state(model, tx, ema=config.optimizer.ema_decay > 0)
        return LoadedCheckpoint(step, info, model, checkpoints.restore(step, abstract_state))
