"""Restores a checkpoint together with its model and policy."""

from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.config import resolve
from jaxft.errors import UserError
from jaxft.models.partition import make_policy
from jaxft.models.policy import Policy
from jaxft.models.resnet import ResNet, make_model
from jaxft.run.checkpoints import Checkpoints
from jaxft.run.remote_workdir import display_name, reading_folder
from jaxft.run.workdir import Workdir
from jaxft.training.optimizer import make_optimizer
from jaxft.training.state import TrainState, abstract_train_state


class LoadedCheckpoint(NamedTuple):
    """A checkpoint with everything that is needed to use it."""

    step: int
    info: dict[str, Any]  # config, class_names, preprocessing, weights, versions
    model: ResNet
    policy: Policy
    state: TrainState  # on every local device


def load_checkpoint(workdir: str | Path, which: str) -> LoadedCheckpoint:
    """Loads a checkpoint: 'best', 'latest' or the number of a step. Raises UserError if there is none."""
    folder = Workdir(reading_folder(workdir))
    if not folder.has_checkpoint():
        name = display_name(folder.path)
        raise UserError(f"there is no checkpoint in {name}; train first, or name another --workdir")
    with closing(Checkpoints(folder)) as checkpoints:
        step = checkpoints.resolve(which)
        info = checkpoints.info(step)
        config = resolve(info["config"])
        model = make_model(config.model, len(info["class_names"]))
        policy = make_policy(config, model, config.num_epochs)
        tx = make_optimizer(config.optimizer, steps_per_epoch=1, num_epochs=1)  # for the structure of its state
        abstract_state = abstract_train_state(model, tx, policy, ema=config.optimizer.ema_decay > 0)
        return LoadedCheckpoint(step, info, model, policy, checkpoints.restore(step, abstract_state))
