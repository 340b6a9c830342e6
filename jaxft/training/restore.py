"""Restores a checkpoint together with its model and policy, also as the pretrained weights of another run."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxft.config import resolve
from jaxft.errors import UserError, write_message
from jaxft.files import expand_user
from jaxft.models.build import make_model
from jaxft.models.fold import fold_head_norm
from jaxft.models.network import Network, options_of
from jaxft.models.partition import make_policy
from jaxft.models.policy import Policy
from jaxft.run.checkpoint_reader import NEWEST_GOOD, CheckpointReader, DamagedCheckpointError
from jaxft.run.metrics_file import read_calibration, read_scores
from jaxft.run.remote_workdir import display_name, is_remote, reading_folder
from jaxft.run.workdir import ACCURACY, CHECKPOINTS, METRICS, Workdir
from jaxft.targets.calibration import check_calibrations
from jaxft.targets.joint import (
    count_outputs,
    find_metric,
    format_metric,
    targets_of,
    value_of_score,
)
from jaxft.training.optimizer import make_optimizer
from jaxft.training.state import TrainState, abstract_train_state

ATTEMPTS = 10  # to read a checkpoint while a run replaces it
SETTLED_SECONDS = 0.2  # a checkpoint that is being deleted changes within this time


class LoadedCheckpoint(NamedTuple):
    """A checkpoint with everything that is needed to use it."""

    step: int
    info: dict[str, Any]  # config, class_names, preprocessing, weights, versions
    model: Network
    policy: Policy
    state: TrainState  # on every local device


class _Template(NamedTuple):
    """The parts that all checkpoints of a run share."""

    config: dict[str, Any]
    model: Network
    policy: Policy
    abstract_state: TrainState


def load_checkpoint(workdir: str | Path, which: str) -> LoadedCheckpoint:
    """Loads a checkpoint: 'best', 'latest' or the number of a step. Raises UserError if there is none.

    If a run replaces the checkpoint meanwhile, the newest or best one is looked up again.
    """
    folder = Workdir(reading_folder(workdir))
    if not folder.has_checkpoint():
        name = display_name(folder.path)
        raise UserError(f"there is no checkpoint in {name}; train first, or name another --workdir")
    checkpoints, template = CheckpointReader(folder), None
    for attempt in range(ATTEMPTS):
        step = checkpoints.resolve(which)
        before = _contents(folder)
        try:
            info = checkpoints.info(step)
            if template is None or template.config != info["config"]:
                template = _make_template(info)
            state = checkpoints.restore(step, template.abstract_state)
            if resolve(info["config"]).data.val_split:
                info = info | {"calibration": _calibration(folder, step, info)}
            return LoadedCheckpoint(step, info, template.model, template.policy, state)
        except UserError:
            time.sleep(SETTLED_SECONDS if before == _contents(folder) else 0)
            if attempt == ATTEMPTS - 1 or before == _contents(folder):
                raise
    raise AssertionError


def _calibration(folder: Workdir, step: int, info: dict[str, Any]) -> dict[str, Any]:
    """Returns {target: calibration} of a checkpoint; {} if there is none, which is reported unless all are numbers.

    Raises UserError if the calibration belongs to other targets.
    """
    found = read_calibration(folder.metrics, step)
    try:
        check_calibrations([target.field for target in targets_of(info)], found)
    except ValueError as error:
        text = "put it back, or remove it to do without a calibration"
        raise UserError(f"{folder.accuracy} is of another run ({error}); {text}") from None
    if not found and any(target.field.kind != "number" for target in targets_of(info)):
        text = "its probabilities are not calibrated, thresholds are 0.5"
        write_message(f"{ACCURACY} has no calibration of checkpoint {step}: {text}")
    return found


def _make_template(info: dict[str, Any]) -> _Template:
    config = resolve(info["config"])
    model = make_model(config.model, count_outputs(targets_of(info)))
    policy = make_policy(config, model, config.num_epochs)
    # for the structure of its state
    tx = make_optimizer(config.optimizer, steps_per_epoch=1, num_epochs=1, parts=model.parts)
    abstract_state = abstract_train_state(model, tx, policy, ema=config.optimizer.ema_decay > 0)
    return _Template(info["config"], model, policy, abstract_state)


def _contents(folder: Workdir) -> list[tuple[str, int]]:
    """Returns the paths and times of the files of all complete checkpoints; skips files that vanish meanwhile."""
    found = []
    for step in folder.steps():
        for parent, _, names in os.walk(folder.checkpoints / str(step)):  # ignores folders that have vanished
            for path in (Path(parent, name) for name in names):
                with suppress(OSError):
                    found.append((str(path), path.lstat().st_mtime_ns))
    return sorted(found)


def named_after(error: UserError, key: str) -> UserError:
    """Rewords an error about --workdir for a workdir that a config key names."""
    if isinstance(error, DamagedCheckpointError):
        return UserError(f"{key}: {error.reason}; resume that run with {NEWEST_GOOD}, or name another --config.{key}")
    text = str(error).replace("--workdir", f"--config.{key}")
    return UserError(text if key in text else f"{key}: {text}")


def is_workdir(source: str) -> bool:
    """Returns whether a source of pretrained weights is a run: a URL of a bucket, or a folder with a run's files."""
    if source.partition("://")[0] in ("http", "https"):
        return False
    try:
        folder = expand_user(Path(source))
        return is_remote(source) or any(os.path.lexists(folder / name) for name in (CHECKPOINTS, METRICS))
    except (OSError, ValueError):  # not a path; load_pretrained says so
        return False


def load_weights(workdir: str, arch: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (variables, provenance) of a run's best checkpoint, or of its latest if none is evaluated, on the host.

    head_norm is folded into the head. The provenance has the class names. Raises UserError if there is no checkpoint or
    if it is of another architecture than `arch`; None accepts any.
    """
    try:
        folder = Workdir(reading_folder(workdir))
        scores = read_scores(folder.metrics) or {}
        which = "best" if any(step in scores for step in folder.steps()) else "latest"
        step, info, model, _, state = load_checkpoint(workdir, which)
    except UserError as error:
        raise named_after(error, "model.pretrained") from None
    found = info["config"]["model"]["arch"]
    if arch not in (None, found):
        raise UserError(f"{workdir} is a run of a {found}, not a {arch}; set --config.model.arch={found}")
    targets = targets_of(info)
    metric = find_metric(targets, resolve(info["config"]).best_metric)
    scored = f", {metric} {format_metric(metric, value_of_score(metric, scores[step]))}" if step in scores else ""
    provenance = {
        "arch": found,
        **options_of(model),
        "num_classes": model.num_classes,
        "source": f"checkpoint {step} ({which}{scored}) of {workdir}",
        "checkpoint": step,
        "mean": info["preprocessing"]["mean"],
        "std": info["preprocessing"]["std"],
        "preprocessing": info["preprocessing"],
        "class_names": info["class_names"],
        **{key: info[key] for key in ("targets",) if key in info},
        "weights": info["weights"],
        "num_batches_tracked": info["weights"].get("num_batches_tracked", {}),
    }
    return fold_head_norm(jax.device_get(state.variables()), model.head), provenance
